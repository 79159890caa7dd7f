"""Confidence intervals cover the truth as often as they say, and verdicts follow from them."""

import numpy as np
import pytest

from papers.confidence import difference, gain


@pytest.mark.parametrize("seeds", [2, 5, 10])
def test_intervals_cover_the_true_difference_in_95_of_100_cases(rng: np.random.Generator, seeds: int) -> None:
    covered = 0
    for _ in range(2000):
        # What seeds have in common cancels in pairs.
        shared = rng.normal(0, 10, seeds)
        theirs, ours = shared + rng.normal(0, 1, seeds), shared + 0.3 + rng.normal(0, 1, seeds)
        mean, half = difference(theirs.tolist(), ours.tolist())
        covered += abs(mean - 0.3) <= half
    assert covered / 2000 == pytest.approx(0.95, abs=0.015)


def test_verdicts_need_an_interval_without_zero() -> None:
    assert gain("", [1.0, 2.0], [2.0, 3.01], "").verdict == "wins"
    assert gain("", [1.0, 2.0], [0.0, 0.99], "").verdict == "loses"
    assert gain("", [1.0, 2.0], [2.0, 2.5], "").verdict == "no difference"
    row = gain("item", [1.0, 2.0], [2.0, 4.0], "against x")
    assert (row.paper, row.ours, row.error) == (1.5, 3.0, 1.0)
    assert row.note == "against x; difference +1.500 +- 6.355 over 2 seeds"
