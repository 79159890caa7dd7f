"""Nodes that die and join: requests go on elsewhere with what they have got, and nothing leaks or counts twice."""

import dataclasses
import itertools
import random

import pytest

from serving.conductor import ConductorConfig
from serving.request import TraceRequest
from serving.simulator.config import ClusterConfig
from serving.simulator.performance import Performance, mooncake_a800
from serving.simulator.result import SimulationResult
from serving.simulator.simulation import Simulation
from serving.workload.outcomes import tbt_s
from serving.workload.requests import Trace
from tests.serving.simulator.equivalence import SIZE, random_trace

A800 = mooncake_a800()
COSTS = A800.costs


def run(config: ClusterConfig, *requests: TraceRequest, performance: Performance = A800) -> SimulationResult:
    return Simulation(config, performance).run(Trace("t", requests, SIZE))


def decode_times(start_s: float, context: int, tokens: int) -> list[float]:
    """When a request that is alone in its batch gets each of so many tokens."""
    times = []
    for _ in range(tokens):
        start_s += COSTS.decode_s(1, context)
        context += 1
        times.append(start_s)
    return times


def handover_s(tokens: int, started_s: float, ended_s: float) -> float:
    return max(ended_s + COSTS.transfer_s(tokens) / 80, started_s + COSTS.transfer_s(tokens))


def test_a_decode_node_dies_and_the_request_goes_on_from_its_last_token() -> None:
    blocks = tuple(range(16))
    request = TraceRequest(id="0", arrival_s=0.0, input_tokens=1000, output_tokens=200, keys=blocks)
    dies_s = 3.0
    result = run(ClusterConfig(prefill=1, decode=2, failures=((dies_s, 1),)), request)
    first_s = COSTS.prefill_s(1000, 0)
    before = [t for t in decode_times(handover_s(1000, 0.0, first_s), 1001, 199) if t < dies_s]
    got = 1 + len(before)
    # The 15 blocks that were full are still on the prefill node; the rest and what was generated are computed.
    again_s = dies_s + COSTS.prefill_s(1000 + got, 15 * SIZE)
    after = decode_times(handover_s(1000 + got, dies_s, again_s), 1000 + got + 1, 200 - got - 1)
    times = [first_s, *before, again_s, *after]
    (outcome,) = result.outcomes
    assert len(times) == 200
    assert (outcome.outcome, outcome.output_tokens, outcome.prefill, outcome.decode) == ("completed", 200, "p0", "d1")
    assert outcome.ttft_s == pytest.approx(first_s)
    assert outcome.finished_s == pytest.approx(times[-1])
    assert outcome.tbt_s == pytest.approx(tbt_s([b - a for a, b in itertools.pairwise(times)]))
    assert outcome.hit_tokens == sum(result.hits_by_tier.values()) == 0
    assert result.reruns == 1
    assert result.wasted_prefill_s == pytest.approx(first_s)
    assert result.prefill_s == pytest.approx(first_s + again_s - dies_s)


def test_a_prefill_node_dies_at_work() -> None:
    result = run(
        ClusterConfig(prefill=2, decode=1, failures=((0.4, 0),)),
        TraceRequest(id="0", arrival_s=0.0, input_tokens=8000, output_tokens=1, keys=tuple(range(125))),
    )
    (outcome,) = result.outcomes
    assert outcome.prefill == "p1"
    assert outcome.ttft_s == pytest.approx(0.4 + COSTS.prefill_s(8000, 0))
    assert result.wasted_prefill_s == pytest.approx(0.4)


def test_a_decode_node_dies_before_the_prefill_is_done() -> None:
    result = run(
        ClusterConfig(prefill=1, decode=2, failures=((0.4, 1),)),
        TraceRequest(id="0", arrival_s=0.0, input_tokens=8000, output_tokens=20, keys=tuple(range(125))),
    )
    (outcome,) = result.outcomes
    ended_s = COSTS.prefill_s(8000, 0)
    assert (outcome.decode, result.reruns, result.wasted_prefill_s) == ("d1", 0, 0.0)
    assert outcome.finished_s == pytest.approx(decode_times(handover_s(8000, 0.0, ended_s), 8001, 19)[-1])


def slow_network() -> Performance:
    return mooncake_a800(bandwidth=1e9)


def test_kv_on_its_way_dies_with_its_sender() -> None:
    """8,000 tokens take 2.6 s at 1 GB/s, and prefill ends after 1 s."""
    request = TraceRequest(id="0", arrival_s=0.0, input_tokens=8000, output_tokens=20, keys=tuple(range(125)))
    result = run(ClusterConfig(prefill=2, decode=1, failures=((2.0, 0),)), request, performance=slow_network())
    (outcome,) = result.outcomes
    ended_s = COSTS.prefill_s(8000, 0)
    assert outcome.ttft_s == pytest.approx(ended_s)
    assert outcome.hit_tokens == 0
    again_s = 2.0 + COSTS.prefill_s(8001, 0)
    # The receiver is told nothing of the end: its NIC stays booked until the first transfer would have been through.
    booked_s = slow_network().costs.transfer_s(8000)
    arrived_s = booked_s + slow_network().costs.transfer_s(8001)
    assert arrived_s > again_s
    assert outcome.finished_s == pytest.approx(decode_times(arrived_s, 8002, 18)[-1])
    assert result.wasted_prefill_s == pytest.approx(ended_s)


def test_kv_on_its_way_is_sent_again_when_its_receiver_dies() -> None:
    request = TraceRequest(id="0", arrival_s=0.0, input_tokens=8000, output_tokens=20, keys=tuple(range(125)))
    result = run(ClusterConfig(prefill=1, decode=2, failures=((2.0, 1),)), request, performance=slow_network())
    (outcome,) = result.outcomes
    assert (outcome.decode, result.reruns, result.wasted_prefill_s) == ("d1", 0, 0.0)
    # The sender is through with the first transfer, in vain, before it begins the second.
    arrived_s = 2 * slow_network().costs.transfer_s(8000)
    assert outcome.finished_s == pytest.approx(decode_times(arrived_s, 8001, 19)[-1])


def test_a_pull_whose_source_dies_is_computed_instead() -> None:
    """p0 holds the prefix and is busy; its NIC is slow, so p1 still fetches when p0 dies."""
    blocks = tuple(range(100))
    requests = (
        TraceRequest(id="0", arrival_s=0.0, input_tokens=100 * SIZE, output_tokens=1, keys=blocks),
        TraceRequest(id="1", arrival_s=3.0, input_tokens=100, output_tokens=1),
        TraceRequest(id="2", arrival_s=5.0, input_tokens=120_000, output_tokens=1),
        TraceRequest(id="3", arrival_s=5.1, input_tokens=100 * SIZE + 10, output_tokens=1, keys=(*blocks, 5000)),
    )
    performance = mooncake_a800(bandwidth=3e9)
    whole = run(ClusterConfig(prefill=2, decode=1), *requests, performance=performance)
    assert whole.hits_by_tier["remote"] == 100 * SIZE
    result = run(ClusterConfig(prefill=2, decode=1, failures=((5.3, 0),)), *requests, performance=performance)
    last = result.outcomes[3]
    assert (last.prefill, last.hit_tokens) == ("p1", 0)
    assert sum(result.hits_by_tier.values()) == sum(outcome.hit_tokens for outcome in result.outcomes)


@pytest.mark.parametrize("seed", range(12))
def test_everything_is_completed_once_while_nodes_come_and_go(seed: int) -> None:
    rng = random.Random(seed)
    trace = random_trace(rng, 150, 8.0)
    coupled = seed % 3 == 2
    nodes = {"prefill": 0, "decode": 0, "coupled": 4} if coupled else {"prefill": 3, "decode": 3}
    # Nodes 0 and 3 stay, so that each pool always has one.
    flapping = [node for node in range(4 if coupled else 6) if node not in (0, 3)]
    failures = tuple((rng.uniform(0, 20), node) for node in flapping for _ in range(3))
    joins = tuple((rng.uniform(0, 20), node) for node in flapping for _ in range(3))
    config = ClusterConfig(
        **nodes,
        conductor=ConductorConfig(placement="least_loaded" if coupled else "kvcache_centric_adaptive"),
        host_blocks=rng.choice([50, 1000]),
        ssd_blocks=rng.choice([0, 200]),
        chunk=rng.choice([0, 256]) if coupled else 0,
        failures=failures,
        joins=joins,
    )
    performance = mooncake_a800(bandwidth=rng.choice([1e9, 87e9]))
    simulation = Simulation(config, performance)
    result = simulation.run(trace)
    assert result == Simulation(config, performance).run(trace)
    assert result.reruns > 0
    for outcome, request in zip(result.outcomes, trace.requests, strict=True):
        assert (outcome.id, outcome.outcome) == (request.id, "completed")
        assert (outcome.output_tokens, outcome.input_tokens) == (request.output_tokens, request.input_tokens)
        assert outcome.hit_tokens < request.input_tokens
        assert (outcome.tbt_s is None) == (request.output_tokens == 1)
        # Every gap fits between the first token and the last.
        if outcome.tbt_s is not None:
            assert outcome.ttft_s + outcome.tbt_s <= outcome.finished_s - outcome.arrival_s + 1e-9
    assert sum(result.hits_by_tier.values()) == sum(outcome.hit_tokens for outcome in result.outcomes)
    useful_s = result.prefill_s - result.wasted_prefill_s
    assert useful_s > 0
    for node in simulation.mirror.decode:
        assert (node.assigned, node.assigned_tokens, node.present) == (0, 0, 0)
    assert simulation.conductor.occupancy.running == 0
    held = sum(len(cache) for cache in simulation.cluster.world.caches)
    directory = simulation.mirror.directory
    blocks = {block for request in trace.requests for block in request.keys}
    assert held == sum(directory.holders(block).bit_count() for block in blocks)


def test_only_nodes_that_are_up_are_paid() -> None:
    request = TraceRequest(id="0", arrival_s=0.0, input_tokens=1000, output_tokens=100)
    config = ClusterConfig(prefill=2, decode=2, failures=((1.0, 0), (2.0, 0), (2.5, 0)), joins=((1.5, 0), (2.0, 3)))
    result = run(config, request)
    end_s = result.outcomes[0].finished_s
    assert end_s > 2.5
    # Node 0 from 0 to 1 s and from 1.5 to 2 s, nodes 1 and 2 all the time, node 3 from 2 s on.
    assert result.node_hours == pytest.approx((1.0 + 0.5 + 2 * end_s + (end_s - 2.0)) / 3600)


def test_what_streams_and_finds_no_place_has_failed() -> None:
    request = TraceRequest(id="0", arrival_s=0.0, input_tokens=1000, output_tokens=100)
    (outcome,) = run(ClusterConfig(prefill=1, decode=1, failures=((1.0, 1),)), request).outcomes
    assert outcome.outcome == "failed"
    assert 1 < outcome.output_tokens < 100
    assert outcome.ttft_s == pytest.approx(COSTS.prefill_s(1000, 0))
    (outcome,) = run(
        ClusterConfig(prefill=1, decode=1, failures=((0.1, 0),)), dataclasses.replace(request, output_tokens=2)
    ).outcomes
    assert (outcome.outcome, outcome.output_tokens, outcome.ttft_s) == ("rejected", 0, None)
