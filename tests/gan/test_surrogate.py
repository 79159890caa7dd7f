"""The surrogate search: it finds what exhaustion found, counts what it evaluates, and one seed is one run."""

import dataclasses

import jax
import numpy as np
import pytest

from gan import surrogate
from gan.ledger import Ledger, SearchResult
from gan.polish import polish, predicted_gains
from gan.problems import Problem, problem
from gan.proposer import Proposer
from gan.surrogate import SurrogateSettings


def path(result: SearchResult) -> list[tuple[int, float]]:
    return [(point.evaluations, point.best) for point in result.curve]


SMALL = SurrogateSettings(elites=40, children=20, screening=8)


def test_the_optimum_of_a_short_length_is_found() -> None:
    mmf = problem("mmf", 25)
    result = surrogate.run(mmf, 60_000, seed=0, stop_at=mmf.target, settings=SMALL)
    assert result.best == pytest.approx(32.474, abs=1e-3)  # the largest SIR of all 2^25 codes
    assert result.evaluations < 60_000
    assert result.entries[0].method == "surrogate"
    assert [point.best for point in result.curve] == sorted(point.best for point in result.curve)


def test_one_seed_is_one_run_within_its_budget() -> None:
    mocss = problem("mocss", 4, flocks=2, sequences=2)
    first, second = (surrogate.run(mocss, 3000, seed=3, settings=SMALL) for _ in range(2))
    assert first.evaluations == second.evaluations == 3000
    assert path(first) == path(second) != path(surrogate.run(mocss, 3000, seed=4, settings=SMALL))
    np.testing.assert_array_equal([entry.code for entry in first.entries], [entry.code for entry in second.entries])


def test_gains_predict_single_flips(rng: np.random.Generator) -> None:
    mmf = problem("mmf", 59)
    codes = mmf.random(rng, 20)
    flipped = np.repeat(codes[:, None], 59, axis=1) * (1 - 2 * np.eye(59, dtype=np.int8))
    before = np.log(np.asarray(mmf.score(codes)))
    after = np.log(np.asarray(mmf.score(flipped.reshape(-1, 59)))).reshape(20, 59)
    true, predicted = after - before[:, None], predicted_gains(mmf, codes)
    assert np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(true, predicted, strict=True)]) > 0.7


def test_polishing_pays_for_gradients_and_neighbours(rng: np.random.Generator) -> None:
    mmf = problem("mmf", 31)
    ledger = Ledger(mmf, 10_000)
    codes = mmf.gauge(mmf.random(rng, 30))
    scores = ledger.evaluate(codes)
    before = ledger.evaluations
    polished, reached, seen = polish(ledger, codes, scores, flips=2, steps=1)
    neighbours = np.unique(np.concatenate([found for found, _ in seen]), axis=0)
    assert ledger.evaluations == before + 30 + len(neighbours)
    assert (reached >= scores).all()
    np.testing.assert_allclose(mmf.score(polished), reached, rtol=1e-5)


def test_a_restart_draws_a_generator_that_learns_anew(rng: np.random.Generator) -> None:
    mmf = problem("mmf", 13)
    parents = mmf.random(rng, 64)

    def weights(proposer: Proposer) -> list[np.ndarray]:
        return [np.array(leaf) for leaf in jax.tree.leaves(proposer._networks.generator)]

    fixed = Proposer(mmf, SMALL.proposer, seed=0)
    drawn = weights(fixed)
    fixed.renew_generator()
    assert all((a == b).all() for a, b in zip(drawn, weights(fixed), strict=True))
    proposer = Proposer(mmf, dataclasses.replace(SMALL.proposer, learn_generator=True, steps=2), seed=0)
    proposer.learn(parents, parents, np.zeros(64, np.float32), rng)
    learned = weights(proposer)
    proposer.renew_generator()
    assert any((a != b).any() for a, b in zip(learned, weights(proposer), strict=True))
    assert not any(np.any(moment) for moment in jax.tree.leaves(proposer._networks.generator_optimizer))


def test_a_generation_without_learning_still_searches() -> None:
    mmf = problem("mmf", 13)
    proposer = dataclasses.replace(SMALL.proposer, steps=0)
    config = dataclasses.replace(SMALL, proposer=proposer, screening=1, flips=0)
    assert surrogate.run(mmf, 20_000, seed=0, stop_at=37.0, settings=config).best == pytest.approx(37.0, abs=1e-3)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "smallest",
    [
        problem("mmf", 3),
        problem("mmf_skew", 3),
        problem("ob_zcp_folded", 3),
        problem("mocss", 1, flocks=1, sequences=1),
    ],
    ids=str,
)
def test_the_smallest_lengths_are_searched(smallest: Problem) -> None:
    assert np.isfinite(surrogate.run(smallest, 100, seed=0, settings=SMALL).best)
