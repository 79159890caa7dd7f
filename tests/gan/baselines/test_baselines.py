"""The classical searches: they find known optima, repeat themselves under a seed, and pay for what they evaluate."""

import dataclasses
import math
from typing import ClassVar

import jax
import pytest

from gan.baselines import METHODS
from gan.baselines.genetic import GeneticSettings
from gan.problems import Problem, PulseCompression, problem

methods = pytest.mark.parametrize("method", METHODS)


@methods
@pytest.mark.parametrize("case", [problem("mmf", 13), problem("ob_zcp", 7, kind=1), problem("mocss", 4)], ids=str)
def test_optima_of_small_problems_are_found(method: str, case: Problem) -> None:
    result = METHODS[method](case, 200_000, 0, stop_at=case.target)
    assert result.evaluations_to(case.target) is not None
    assert result.evaluations == result.evaluations_to(case.target) < 200_000
    assert case.is_hit(result.best)
    for entry in result.entries:
        assert case.is_hit(entry.value)
        assert float(case.exact(entry.code)) == entry.value


@methods
def test_a_seed_gives_the_same_search_and_another_seed_another(method: str) -> None:
    pair = problem("ob_zcp", 7, kind=1)
    results = [METHODS[method](pair, 60_000, seed) for seed in (3, 3, 4)]
    first, again, other = ([(entry.evaluation, *entry.code) for entry in result.entries] for result in results)
    assert results[0].evaluations == 60_000
    assert first == again != other
    curves = [[(point.evaluations, point.best) for point in result.curve] for result in results]
    assert curves[0] == curves[1]


@dataclasses.dataclass(frozen=True)
class _Counted(PulseCompression):
    """Counts the evaluations that the device really makes."""

    made: ClassVar[list[int]] = []

    def _score(self, codes: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: self.made.append(codes.shape[0]))
        return super()._score(codes)

    def _score_flips(self, codes: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: self.made.append(codes.size))
        return super()._score_flips(codes)


@methods
def test_every_evaluation_is_paid_for(method: str) -> None:
    _Counted.made.clear()
    paid: list[int] = []
    METHODS[method](_Counted(13), 130_000, 0, lambda evaluations, best: paid.append(evaluations))
    jax.effects_barrier()
    # The device finishes the last chunk of steps; the ledger pays for what the budget covers.
    assert len(paid) >= 4
    assert sum(_Counted.made) == paid[-2] + (paid[-2] - paid[-3])
    assert paid[-1] == 130_000


@methods
def test_a_budget_below_one_step_finds_nothing_and_says_so(method: str) -> None:
    result = METHODS[method](problem("mmf", 13), 10, 0)
    assert result.evaluations == 10
    assert result.curve[-1].best == result.best


def test_impossible_populations_are_refused() -> None:
    with pytest.raises(ValueError, match="200 elites out of 100 children"):
        GeneticSettings(elites=200, children=100)
    with pytest.raises(ValueError, match="`polish` is 300"):
        GeneticSettings(polish=300)


@methods
@pytest.mark.usefixtures("quick_compilation")
def test_the_smallest_length_is_searched(method: str) -> None:
    assert math.isfinite(METHODS[method](problem("mmf_skew", 3), 5000, 0).best)


@methods
def test_hits_are_known_where_they_are_made(method: str) -> None:
    pair = problem("ob_zcp", 7, kind=1)
    found = [entry.evaluation for entry in METHODS[method](pair, 60_000, 3).entries if entry.hit]
    assert len(set(found)) == len(found)
