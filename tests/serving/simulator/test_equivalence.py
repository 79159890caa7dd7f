"""The fast simulator equals a token-by-token one on hundreds of small random clusters."""

import dataclasses
import random

import pytest

from serving.simulator.decode_table import DecodeTable
from serving.simulator.performance import Performance, mooncake_a800
from tests.serving.simulator.equivalence import compare, random_trace


def random_performance(rng: random.Random) -> Performance:
    base = mooncake_a800(bandwidth=10 ** rng.uniform(8.5, 11))
    costs = dataclasses.replace(base.costs, decode_token=rng.choice([0.0, 3.45e-8, 1e-6]))
    return dataclasses.replace(base, costs=costs, kv_capacity_tokens=rng.choice([30_000, 1_300_000]))


def random_table(rng: random.Random) -> DecodeTable:
    """Few knots, close together, so that requests cross many."""
    batches = sorted(rng.sample(range(1, 30), rng.randint(2, 5)))
    contexts = sorted(rng.sample(range(100, 20_000), rng.randint(2, 30)))
    rows = [sorted(rng.uniform(0.005, 0.1) for _ in contexts) for _ in batches]
    return DecodeTable(tuple(batches), tuple(contexts), tuple(map(tuple, rows)))


def check(seed: int, *, coupled: bool, tabled: bool = False) -> None:
    rng = random.Random(seed)
    trace = random_trace(rng, rng.randint(1, 40), rng.choice([0.3, 2.0, 20.0]))
    performance = random_performance(rng)
    if tabled:
        performance = dataclasses.replace(performance, decode_table=random_table(rng))
    if coupled:
        performance = dataclasses.replace(performance, kv_capacity_tokens=1_300_000)
    blocks = rng.choice([8, 100, 10_000])
    nodes = {"coupled": rng.randint(1, 3)} if coupled else {"prefill": rng.randint(1, 3), "decode": rng.randint(1, 3)}
    chunk = rng.choice([0, 64, 500]) if coupled else 0
    compare(trace, performance, {"prefill": 0, "decode": 0, "coupled": 0} | nodes, blocks, chunk)


@pytest.mark.parametrize("batch", range(10))
def test_disaggregated_equals_token_by_token(batch: int) -> None:
    for seed in range(batch * 30, batch * 30 + 30):
        check(seed, coupled=False)


@pytest.mark.parametrize("batch", range(10))
def test_coupled_equals_token_by_token(batch: int) -> None:
    for seed in range(batch * 30, batch * 30 + 30):
        check(1000 + seed, coupled=True)


@pytest.mark.parametrize("coupled", [False, True])
def test_decode_times_by_table_equal_token_by_token(coupled: bool) -> None:
    for seed in range(2000, 2100):
        check(seed, coupled=coupled, tabled=True)
