"""The tiers behind a node's memory: SSDs of others, and a remote store that outlives nodes."""

import random

import pytest

from serving.conductor import ConductorConfig
from serving.request import TraceRequest
from serving.simulator.config import ClusterConfig
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import mooncake_a800
from serving.simulator.result import SimulationResult
from serving.simulator.simulation import Simulation
from serving.workload.requests import Trace
from tests.serving.simulator.equivalence import SIZE, random_trace

A800 = mooncake_a800()
COSTS = A800.costs
BLOCKS = tuple(range(100))


def run(config: ClusterConfig, *requests: TraceRequest) -> SimulationResult:
    return Simulation(config, A800).run(Trace("t", requests, SIZE))


def test_what_was_written_through_survives_its_node() -> None:
    requests = [
        TraceRequest(id=str(i), arrival_s=20.0 * i, input_tokens=100 * SIZE, output_tokens=1, keys=BLOCKS)
        for i in range(2)
    ]
    config = ClusterConfig(prefill=2, decode=1, failures=((10.0, 0),), store_blocks=1000)
    result = run(config, *requests)
    assert [outcome.prefill for outcome in result.outcomes] == ["p0", "p1"]
    assert result.hits_by_tier == {"host": 0, "ssd": 0, "remote": 0, "store": 100 * SIZE - 1}
    # Fetching takes 24 ms and is done while the last token is computed.
    fetch_s = COSTS.transfer_s(100 * SIZE - 1)
    assert result.outcomes[1].ttft_s == pytest.approx(max(fetch_s, COSTS.prefill_s(100 * SIZE, 100 * SIZE - 1)))


def test_without_memory_of_their_own_nodes_still_pull_from_the_store() -> None:
    requests = [
        TraceRequest(id=str(i), arrival_s=20.0 * i, input_tokens=100 * SIZE, output_tokens=1, keys=BLOCKS)
        for i in range(3)
    ]
    assert run(ClusterConfig(prefill=1, decode=1, host_blocks=0, store_blocks=1000), *requests).hits_by_tier[
        "store"
    ] == 2 * (100 * SIZE - 1)
    assert run(ClusterConfig(prefill=1, decode=1, host_blocks=0), *requests).hits_by_tier["store"] == 0


def test_the_store_is_written_once_and_forgets_when_it_is_full() -> None:
    requests = [
        TraceRequest(id=str(i), arrival_s=20.0 * i, input_tokens=100 * SIZE, output_tokens=1, keys=BLOCKS)
        for i in range(3)
    ]
    simulation = Simulation(ClusterConfig(prefill=2, decode=1, store_blocks=1000), A800)
    simulation.run(Trace("t", tuple(requests), SIZE))
    assert simulation.cluster.world.store is not None
    assert simulation.cluster.world.store.written_tokens == 100 * SIZE
    other = TraceRequest(id="1", arrival_s=20.0, input_tokens=60 * SIZE, output_tokens=1, keys=tuple(range(500, 560)))
    small = run(ClusterConfig(prefill=1, decode=1, host_blocks=0, store_blocks=100), requests[0], other, requests[2])
    # The least recently used go first, and of those the end of the prompt.
    assert small.outcomes[2].hit_tokens == 40 * SIZE


def test_writes_take_the_network_of_their_node_behind_what_decode_waits_for() -> None:
    slow = mooncake_a800(bandwidth=1e9)
    requests = (
        TraceRequest(id="0", arrival_s=0.0, input_tokens=100 * SIZE, output_tokens=10, keys=BLOCKS),
        TraceRequest(id="1", arrival_s=0.9, input_tokens=100, output_tokens=10),
    )
    ends = []
    for store_blocks in (0, 1000):
        simulation = Simulation(ClusterConfig(prefill=1, decode=2, store_blocks=store_blocks, store_nics=1), slow)
        outcomes = simulation.run(Trace("t", requests, SIZE)).outcomes
        ends.append([outcome.finished_s for outcome in outcomes])
    assert ends[1][0] == ends[0][0]
    assert ends[1][1] - ends[0][1] == pytest.approx(slow.costs.transfer_s(100 * SIZE))


def test_a_peer_reads_its_ssd_before_it_sends() -> None:
    """The prefix left p0's memory for its SSD; p1 fetches it, at the speed of the SSD."""
    requests = (
        TraceRequest(id="0", arrival_s=0.0, input_tokens=100 * SIZE, output_tokens=1, keys=BLOCKS),
        TraceRequest(id="1", arrival_s=5.0, input_tokens=100, output_tokens=1),
        TraceRequest(id="2", arrival_s=10.0, input_tokens=100 * SIZE, output_tokens=1, keys=tuple(range(200, 300))),
        TraceRequest(id="3", arrival_s=15.0, input_tokens=100, output_tokens=1),
        TraceRequest(id="4", arrival_s=20.0, input_tokens=40_000, output_tokens=1),
        TraceRequest(id="5", arrival_s=20.0, input_tokens=100 * SIZE, output_tokens=1, keys=BLOCKS),
    )
    config = ClusterConfig(prefill=2, decode=1, host_blocks=100, ssd_blocks=1000)
    outcome = run(config, *requests).outcomes[5]
    in_memory = ClusterConfig(prefill=2, decode=1, host_blocks=1000, ssd_blocks=1000)
    fast = run(in_memory, *requests).outcomes[5]
    assert (outcome.prefill, outcome.hit_tokens) == (fast.prefill, fast.hit_tokens) == ("p1", 100 * SIZE - 1)
    assert outcome.ttft_s == pytest.approx(
        max(A800.ssd_token * 100 * SIZE, COSTS.prefill_s(100 * SIZE, 100 * SIZE - 1))
    )
    assert fast.ttft_s < outcome.ttft_s


@pytest.mark.parametrize("seed", range(6))
def test_hits_of_all_tiers_are_the_hits(seed: int) -> None:
    rng = random.Random(seed)
    trace = random_trace(rng, 150, 8.0)
    config = ClusterConfig(
        prefill=3,
        decode=2,
        host_blocks=rng.choice([0, 50]),
        ssd_blocks=rng.choice([0, 100]),
        store_blocks=rng.choice([200, 5000]),
        conductor=ConductorConfig(placement=rng.choice(["kvcache_centric", "kvcache_centric_adaptive", "marginal"])),
        failures=((5.0, 0), (9.0, 1)),
        joins=((8.0, 0),),
    )
    simulation = Simulation(config, A800)
    result = simulation.run(trace)
    assert result == Simulation(config, A800).run(trace)
    assert all(outcome.outcome == "completed" for outcome in result.outcomes)
    assert result.hits_by_tier["store"] > 0
    assert sum(result.hits_by_tier.values()) == sum(outcome.hit_tokens for outcome in result.outcomes)


@pytest.mark.parametrize("seed", range(3))
def test_the_directory_knows_what_is_on_which_ssd(seed: int) -> None:
    trace = random_trace(random.Random(seed), 200, 8.0)
    simulation = Simulation(
        ClusterConfig(prefill=3, decode=1, host_blocks=60, ssd_blocks=100, failures=((9.0, 1),)), A800
    )
    simulation.run(trace)
    directory = simulation.mirror.directory
    on_ssd = 0
    for block in {block for request in trace.requests for block in request.keys}:
        for node, cache in enumerate(simulation.cluster.world.caches[:3]):
            assert directory.holders(block, tier=1) >> node & 1 == cache.on_ssd([block])
            on_ssd += cache.on_ssd([block])
        assert not directory.holders(block, tier=0) & directory.holders(block, tier=1)
    assert on_ssd > 0


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(SimulatorError, match="which can fetch"):
        ClusterConfig(prefill=0, decode=0, coupled=2, store_blocks=100)
    with pytest.raises(SimulatorError, match="at least 1 NIC"):
        ClusterConfig(prefill=1, decode=1, store_blocks=100, store_nics=0)
