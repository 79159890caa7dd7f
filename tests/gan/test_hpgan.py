"""The paper's loop: it stays in its budget, pays for guidance, repeats by seed and gives up when nothing is new."""

import dataclasses

import jax
import numpy as np
import pytest

from gan import hpgan, metrics
from gan.hpgan import HpganSettings
from gan.problems import problem
from gan.sequences import exhaustive
from gan.training import Gan, GanConfig, GanState

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = HpganSettings(start=200, elites=50, steps=10, samples=100, flips=0)


def test_one_seed_is_one_run_within_its_budget() -> None:
    mmf = problem("mmf", 13)
    first, second = (hpgan.run(mmf, 600, seed=1, settings=SMALL) for _ in range(2))
    assert first.evaluations == second.evaluations == 600
    assert [point[:2] + point[3:] for point in first.curve] == [point[:2] + point[3:] for point in second.curve]
    assert first.method == "hpgan"


def test_guidance_is_paid_for() -> None:
    guided = HpganSettings(
        start=100, elites=25, steps=2, samples=50, gan=GanConfig(codec="rank1", guidance=1.0, batch=16)
    )
    seen: list[int] = []
    hpgan.run(
        problem("mmf", 31), 400, seed=0, progress=lambda evaluations, _: seen.append(evaluations), settings=guided
    )
    assert seen[:2] == [80, 80 + 2 * 2 * 16]  # a fifth of the budget to start with, then two steps on sixteen codes


def test_it_gives_up_when_every_code_is_known() -> None:
    result = hpgan.run(problem("mmf", 5), 5000, seed=0, settings=SMALL)
    assert result.evaluations == 2**3  # the first two chips are gauge
    assert result.best == pytest.approx(13)


def test_from_a_training_set_it_finds_what_is_not_in_it() -> None:
    pair = problem("ob_zcp_folded", 7)
    optimal = exhaustive.optimal_pairs(7, 1).reshape(-1, 14)[:, : pair.chips]
    split = metrics.split_by_class(pair, optimal, seed=0)
    settings = dataclasses.replace(SMALL, training=split.train, flips=2)
    result = hpgan.run(pair, 1500, seed=0, settings=settings)
    known = {code.tobytes() for code in pair.gauge(split.train)}
    found = {entry.code.tobytes() for entry in result.entries if entry.hit}
    assert known < found  # the training set is paid for, and was not all
    assert metrics.held_out_recall(split, {entry.class_id for entry in result.entries}) > 0
    assert result.curve[-1].gradients > 0


def test_the_control_learns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unchanged(gan: Gan, state: GanState, codes: np.ndarray, steps: int) -> tuple[GanState, dict[str, jax.Array]]:
        assert steps == 0
        return state, {}

    monkeypatch.setattr(Gan, "train", unchanged)
    result = hpgan.run_untrained(problem("mmf_skew", 59), 300, seed=0)
    assert (result.method, result.evaluations) == ("hpgan_untrained", 300)
