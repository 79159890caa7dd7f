"""Estimators learn what they are shown."""

import random

import pytest

from serving.conductor.estimators import Occupancy, OnlineRegression, OutputLengths
from serving.conductor.learned_limit import LearnedLimit
from serving.conductor.load_order import LoadOrder


def test_regression_finds_the_coefficients_and_reports_its_error() -> None:
    rng = random.Random(0)
    regression = OnlineRegression((0.0, 0.0, 0.0), (1.0, 10.0, 1e5))
    for _ in range(3000):
        batch, tokens = rng.randint(1, 40), rng.randint(0, 500_000)
        regression.learn((1.0, batch, tokens), 0.02 + 0.004 * batch + 3e-8 * tokens)
    assert regression.weights == pytest.approx((0.02, 0.004, 3e-8), rel=0.02)
    assert regression.error < 0.05


def test_survival_of_outputs_is_the_empirical_one() -> None:
    rng = random.Random(0)
    lengths = OutputLengths()
    for _ in range(20_000):
        lengths.observe(rng.choice([64, 640]))
    assert lengths.mean == pytest.approx(352, rel=0.1)
    assert lengths.survival(0, 128) == pytest.approx(0.5, abs=0.02)
    assert lengths.survival(128, 128) == pytest.approx(1.0, abs=0.02)
    assert lengths.survival(256, 1024) < 0.01


def test_occupancy_counts_running_and_coming_requests() -> None:
    occupancy = Occupancy(prior_s=10.0)
    occupancy.accept(5.0)
    occupancy.accept(12.0)
    occupancy.start(5.0, 5.0)
    assert [occupancy.at(time) for time in (6.0, 12.5, 15.5, 23.0)] == [1, 2, 1, 0]
    occupancy.finish(5.0, 11.0)
    assert occupancy.decode_s == 6.0
    assert occupancy.running == 0


def test_margin_settles_where_its_goal_of_requests_misses() -> None:
    rng = random.Random(0)
    limit = LearnedLimit(goal=0.1)
    for _ in range(5000):
        # TBT grows with the limit and has some spread; 0.8 is where a tenth misses.
        limit.observe(limit.value * rng.uniform(0.5, 1.3334) > 1)
    assert limit.value == pytest.approx(0.8, abs=0.06)


def test_load_order_is_sorted_after_any_changes() -> None:
    rng = random.Random(0)
    order, loads = LoadOrder(), {}
    for step in range(4000):
        index = rng.randrange(500 if step < 2000 else 30)
        if rng.random() < 0.2:
            order.discard(index)
            loads.pop(index, None)
        else:
            loads[index] = rng.choice([0.0, 1.0, rng.random()])
            order.set(index, loads[index])
        mask = rng.choice([rng.getrandbits(500), 1 << rng.randrange(500), ~rng.getrandbits(500), 0])
        if step % 10 == 0:
            assert list(order) == sorted((load, i) for i, load in loads.items())
            assert [*order.among(mask)] == [i for _, i in order if mask >> i & 1]
            assert len(order) == len(loads)
