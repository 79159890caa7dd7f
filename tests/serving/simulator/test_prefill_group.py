"""Groups of prefill nodes: the pipeline's closed form, its recurrence, and what it is good for."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.conductor import ConductorConfig, RoleConfig
from serving.conductor.errors import ConductorError
from serving.conductor.links import Links
from serving.conductor.pipeline import PipelineTimeModel
from serving.request import TraceRequest
from serving.simulator.config import ClusterConfig
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import mooncake_a800
from serving.simulator.result import SimulationResult
from serving.simulator.simulation import Simulation
from serving.workload.requests import Trace
from tests.serving.simulator.equivalence import SIZE, random_trace

A800 = mooncake_a800()


def stage_times(model: PipelineTimeModel, tokens: int, reused: int) -> list[tuple[float, float]]:
    """(hop, seconds) of each chunk, from the costs of whole prompts."""
    times, one = [], A800.costs
    for begin in range(reused, tokens, model.chunk):
        end = min(begin + model.chunk, tokens)
        # What is on the device already needs no loading, except for the first chunk.
        seconds = one.prefill_s(end, begin) - one.prefill_reused * (begin if begin > reused else 0)
        times.append((model.boundary_token * (end - begin), seconds / model.stages))
    return times


def pipeline(model: PipelineTimeModel, jobs: list[tuple[float, int, int]]) -> list[float]:
    """When (arrival, tokens, reused) leave: chunk k is on stage s after chunk k - 1, and after its own stage s - 1."""
    free_s = [0.0] * model.stages
    ends = []
    for arrival_s, tokens, reused in jobs:
        for hop_s, seconds in stage_times(model, tokens, reused):
            done_s = arrival_s
            for stage in range(model.stages):
                begin_s = max(free_s[stage], done_s + (hop_s if stage else 0.0))
                free_s[stage] = done_s = begin_s + seconds
        ends.append(free_s[-1])
    return ends


@given(st.integers(1, 200_000), st.floats(0, 0.999), st.integers(1, 8), st.sampled_from([500, 1024, 8192, 300_000]))
def test_latency_in_closed_form_is_that_of_the_recurrence(tokens: int, share: float, stages: int, chunk: int) -> None:
    model = A800.group(stages, chunk)
    reused = min(int(tokens * share), tokens - 1)
    assert model.prefill_s(tokens, reused) == pytest.approx(pipeline(model, [(0.0, tokens, reused)])[0], rel=1e-9)
    occupied_s = sum(seconds for _, seconds in stage_times(model, tokens, reused))
    assert model.occupied_s(tokens, reused) == pytest.approx(occupied_s, rel=1e-9)


def test_one_stage_and_one_chunk_is_one_instance() -> None:
    model = A800.group(1, 1_000_000)
    for tokens, reused in ((1, 0), (4096, 1000), (128_000, 100_000)):
        assert model.prefill_s(tokens, reused) == pytest.approx(A800.costs.prefill_s(tokens, reused))
        assert model.transfer_s(tokens) == A800.costs.transfer_s(tokens)


def test_long_prompts_are_faster_in_a_group_and_short_ones_as_fast() -> None:
    pair, one = A800.group(2, 8192), A800.costs
    assert pair.prefill_s(131_072, 0) < 0.6 * one.prefill_s(131_072, 0)
    assert pair.prefill_s(4096, 0) == pytest.approx(one.prefill_s(4096, 0), rel=0.1)
    assert A800.group(4, 8192).prefill_s(131_072, 0) < 0.4 * one.prefill_s(131_072, 0)


def simulate(trace: Trace, config: ClusterConfig) -> SimulationResult:
    return Simulation(config, A800).run(trace)


@pytest.mark.parametrize("seed", range(8))
def test_prompts_follow_each_other_through_the_stages(seed: int) -> None:
    rng = random.Random(seed)
    stages, now, requests = rng.randint(2, 4), 0.0, []
    for index in range(60):
        now += rng.expovariate(1.0)
        requests.append(
            TraceRequest(
                id=str(index),
                arrival_s=now,
                input_tokens=rng.choice([100, 4000, 30_000, rng.randint(1, 100_000)]),
                output_tokens=1,
            )
        )
    chunk = rng.choice([1000, 8192])
    result = simulate(
        Trace("t", tuple(requests)), ClusterConfig(prefill=stages, decode=1, cpp=stages, prefill_chunk=chunk)
    )
    model = A800.group(stages, chunk)
    ends = pipeline(model, [(request.arrival_s, request.input_tokens, 0) for request in requests])
    for outcome, request, end_s in zip(result.outcomes, requests, ends, strict=True):
        assert outcome.ttft_s == pytest.approx(end_s - request.arrival_s, abs=1e-9)
    # Device time is that of all nodes of the group.
    spent_s = stages * sum(model.occupied_s(request.input_tokens, 0) for request in requests)
    assert result.prefill_s == pytest.approx(spent_s)


def test_groups_win_on_long_prompts_at_low_load_and_lose_device_time() -> None:
    rng, now, requests = random.Random(3), 0.0, []
    for index in range(200):
        now += rng.expovariate(0.05)
        requests.append(TraceRequest(id=str(index), arrival_s=now, input_tokens=100_000, output_tokens=1))
    trace = Trace("long", tuple(requests))
    alone, grouped = (
        simulate(trace, ClusterConfig(prefill=4, decode=1)),
        simulate(trace, ClusterConfig(prefill=4, decode=1, cpp=4)),
    )
    mean_s = [sum(o.ttft_s for o in result.outcomes) / 200 for result in (alone, grouped)]
    assert mean_s[1] < 0.4 * mean_s[0]
    # Each chunk pays the fixed cost of a prefill again.
    assert alone.prefill_s < grouped.prefill_s < 1.1 * alone.prefill_s


def test_the_nics_of_a_group_share_a_transfer() -> None:
    links, pair, single, other = Links([2, 1, 1, 2, 2]), 0, 1, 2
    assert links.book(pair, single, 4.0, 0.0) == 4.0
    # The pair has sent at half its rate, so half of its bandwidth is left to another receiver.
    assert links.book(pair, other, 4.0, 0.0) == 6.0
    assert links.book(3, 4, 4.0, 1.0) == 3.0


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_left_behind_when_groups_die(seed: int) -> None:
    rng = random.Random(seed)
    trace = random_trace(rng, 150, 10.0)
    config = ClusterConfig(
        prefill=6,
        decode=2,
        cpp=2,
        prefill_chunk=2048,
        host_blocks=200,
        conductor=ConductorConfig(placement="kvcache_centric_adaptive"),
        failures=tuple((rng.uniform(0, 15), node) for node in (0, 1, 0, 1)),
        joins=tuple((rng.uniform(0, 15), node) for node in (0, 1)),
    )
    performance = mooncake_a800(bandwidth=1e9)
    simulation = Simulation(config, performance)
    result = simulation.run(trace)
    assert result == Simulation(config, performance).run(trace)
    assert all(outcome.outcome == "completed" for outcome in result.outcomes)
    assert sum(result.hits_by_tier.values()) == sum(outcome.hit_tokens for outcome in result.outcomes)
    assert all(node.assigned == node.present == 0 for node in simulation.mirror.decode)
    held = sum(len(cache) for cache in simulation.cluster.world.caches)
    blocks = {block for request in trace.requests for block in request.keys}
    assert held == sum(simulation.mirror.directory.holders(block).bit_count() for block in blocks)


def test_a_group_has_the_memory_and_the_price_of_its_nodes() -> None:
    blocks = tuple(range(30))
    requests = tuple(
        TraceRequest(id=str(i), arrival_s=10.0 * i, input_tokens=30 * SIZE, output_tokens=1, keys=blocks)
        for i in range(2)
    )
    trace = Trace("twice", requests, SIZE)
    alone = simulate(trace, ClusterConfig(prefill=2, decode=1, host_blocks=20))
    grouped = simulate(trace, ClusterConfig(prefill=2, decode=1, host_blocks=20, cpp=2))
    assert sum(alone.hits_by_tier.values()) < sum(grouped.hits_by_tier.values()) == 30 * SIZE - 1
    assert grouped.node_hours == pytest.approx(3 * grouped.outcomes[-1].finished_s / 3600)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SimulatorError, match="multiple of the group"):
        ClusterConfig(prefill=3, decode=1, cpp=2)
    with pytest.raises(SimulatorError, match="keep their roles"):
        ClusterConfig(prefill=4, decode=1, cpp=2, conductor=ConductorConfig(roles=RoleConfig()))
    with pytest.raises(SimulatorError, match="nodes 0 to 2"):
        ClusterConfig(prefill=4, decode=1, cpp=2, failures=((1.0, 3),))
    with pytest.raises(ConductorError, match="at least 1 of both"):
        A800.group(2, 0)
