"""Comparisons of searches: medians and ranges over seeds, also where some seeds never arrive."""

import dataclasses

import pytest

from gan import comparison, surrogate
from gan.ledger import Point
from gan.problems import problem
from gan.surrogate import SurrogateSettings

TINY = SurrogateSettings(elites=16, children=8, screening=2)


@pytest.fixture(scope="module")
def results() -> list:
    pair = problem("ob_zcp", 5)
    return [surrogate.run(pair, 300, seed, settings=TINY) for seed in (0, 1, 2)]


def test_totals_are_medians_and_ranges_over_seeds(results: list) -> None:
    total = comparison.totals(results)["surrogate"]
    assert total["seeds"] == 3
    found = sorted(result.evaluations_to(0.0) for result in results)
    assert total["evaluations_to"]["found"] == {
        "score": 0.0,
        "reached": 3,
        "median": found[1],
        "min": found[0],
        "max": found[2],
    }
    assert 1 <= total["classes"]["max"] <= 2  # all there are at N = 5


def test_a_seed_that_does_not_arrive_counts_as_infinite(results: list) -> None:
    late = dataclasses.replace(results[0], curve=(Point(1, 0, 0.1, -50.0), Point(300, 0, 1.0, -4.0)))
    reached = comparison.totals([late, late, results[1]])["surrogate"]["evaluations_to"]["found"]
    assert (reached["reached"], reached["median"], reached["max"]) == (1, None, None)
    assert reached["min"] == results[1].evaluations_to(0.0)


def test_every_currency_reaches_the_same_marks(results: list) -> None:
    curve = (Point(1, 0, 0.1, -50.0), Point(30, 5, 0.2, 0.0), Point(300, 9, 1.0, 0.0))
    total = comparison.totals([dataclasses.replace(results[0], curve=curve)])["surrogate"]
    costs = {currency: total[f"{currency}_to"]["found"]["median"] for currency in comparison.CURRENCIES}
    assert costs == {"evaluations": 30, "evaluations_at_chips": 25 + 5 * 10, "cpu_s": 0.2}  # of 10 chips a code


def test_curves_rise_and_class_curves_count_each_class_once(results: list) -> None:
    (curve,) = comparison.median_curves(results).values()
    assert [best for _, best in curve] == sorted(best for _, best in curve)
    assert curve[-1] == (300, 0.0)
    (classes,) = comparison.class_curves(results).values()
    assert [count for _, count in classes] == list(range(1, len(classes) + 1))


def test_marks_of_pulse_compression() -> None:
    assert [mark.score for mark in comparison.marks(problem("mmf", 59))] == [10.984, 33.453, 43.936, 50.8427]
    assert [mark.name for mark in comparison.marks(problem("mmf", 67))] == ["best known"]
    assert comparison.marks(problem("mmf", 201)) == ()
    assert comparison.marks(problem("mocss", 4))[0].score == 0
