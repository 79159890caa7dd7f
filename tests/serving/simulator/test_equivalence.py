"""The fast simulator equals a token-by-token one on hundreds of small random clusters."""

import dataclasses
import random

import pytest

from serving.conductor import ConductorConfig
from serving.request import TraceRequest
from serving.simulator.config import ClusterConfig
from serving.simulator.decode_table import DecodeTable
from serving.simulator.performance import Performance, mooncake_a800
from serving.simulator.simulation import Simulation
from serving.workload.requests import Trace
from tests.serving.simulator.brute_force import BruteForce, tbt

SIZE = 64


def random_trace(rng: random.Random, count: int, rate: float) -> Trace:
    paths: list[tuple[int, ...]] = [()]
    fresh = iter(range(1_000_000))
    requests, now = [], 0.0
    for index in range(count):
        now += rng.expovariate(rate)
        tokens = int(rng.paretovariate(1.2) * 300) % 20_000 + 1
        parent = rng.choice(paths)
        full = tokens // SIZE
        shared = parent[: rng.randint(0, min(len(parent), full))]
        path = (*shared, *(next(fresh) for _ in range(-(-tokens // SIZE) - len(shared))))
        paths.append(path[:full])
        output = rng.choice([1, 2, 3, rng.randint(4, 20), rng.randint(20, 120)])
        requests.append(
            TraceRequest(id=str(index), arrival_s=now, input_tokens=tokens, output_tokens=output, keys=path)
        )
    return Trace("random", tuple(requests), SIZE)


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


def compare(trace: Trace, performance: Performance, sizes: dict[str, int], blocks: int, chunk: int = 0) -> None:
    config = ClusterConfig(
        **sizes,
        host_blocks=blocks,
        chunk=chunk,
        conductor=ConductorConfig(placement="least_loaded" if sizes["coupled"] else "kvcache_centric"),
    )
    # Capacity is refused by the Conductor too, from a predicted output; the brute force has no such opinion.
    simulation = Simulation(config, performance)
    for node in simulation.mirror.decode:
        node.kv_capacity_tokens = 10**9
    result = simulation.run(trace)
    jobs = BruteForce(performance, **sizes, blocks=blocks, size=SIZE, chunk=chunk).run(trace.requests)
    for outcome, job in zip(result.outcomes, jobs, strict=True):
        assert outcome.outcome == "completed"
        assert outcome.hit_tokens == job.reused
        assert outcome.prefill.endswith(str(job.prefill))
        assert outcome.decode.endswith(str(job.decode))
        assert outcome.ttft_s == pytest.approx(job.ttft_s, rel=1e-9, abs=1e-9)
        assert outcome.finished_s == pytest.approx(job.finished_s, rel=1e-9)
        expected = tbt(job)
        assert outcome.tbt_s == (None if expected is None else pytest.approx(expected, rel=1e-7))


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
