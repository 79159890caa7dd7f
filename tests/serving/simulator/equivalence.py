"""Small random traces, and the check that the simulator serves them as the token-by-token one does."""

import random

import pytest

from serving.conductor import ConductorConfig
from serving.request import TraceRequest
from serving.simulator.config import ClusterConfig
from serving.simulator.performance import Performance
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


def compare(trace: Trace, performance: Performance, sizes: dict[str, int], blocks: int, chunk: int = 0) -> None:
    """Asserts that the instances of both kinds, `sizes` of each, serve the trace at equal times from equal prefixes."""
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
