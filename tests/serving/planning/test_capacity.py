"""The cheapest cluster against trying every one, and what it says of cheaper ones."""

import dataclasses
import itertools
import random

import pytest

from serving.conductor import SLO, ConductorConfig
from serving.planning.capacity import CapacitySearch, ClusterSize, NodeType
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import mooncake_a800
from tests.serving.simulator.equivalence import random_trace

FAST = dataclasses.replace(mooncake_a800(), price_per_hour=10.0)
SLOW_COSTS = dataclasses.replace(FAST.costs, prefill_token=3 * FAST.costs.prefill_token, decode_base=0.06)
SLOW = dataclasses.replace(FAST, costs=SLOW_COSTS, price_per_hour=4.0)
NODE_TYPES = [
    NodeType(
        device=name,
        performance=performance,
        kv_bytes=327_680,
        dram_gb=dram,
        ssd_gb=ssd,
        memory_price=dram * 0.005 + ssd * 1e-4,
    )
    for name, performance in (("fast", FAST), ("slow", SLOW))
    for dram, ssd in ((0.0, 0.0), (2.0, 0.0), (20.0, 0.0), (2.0, 500.0))
]
LARGEST = 4


@pytest.mark.parametrize(("seed", "rate", "tbt_s"), [(1, 4.0, 0.1), (2, 9.0, 0.1), (3, 6.0, 0.05)])
def test_nothing_cheaper_meets_the_slo(seed: int, rate: float, tbt_s: float) -> None:
    trace = random_trace(random.Random(seed), 150, rate)
    conductor = ConductorConfig(slo=SLO(2.0, tbt_s))
    told: list[ClusterSize] = []
    search = CapacitySearch(trace, conductor, attainment=0.9, max_nodes=LARGEST, progress=told.append)
    best = search.cheapest(NODE_TYPES)
    every = CapacitySearch(trace, conductor, attainment=0.9, max_nodes=LARGEST)
    grid = itertools.product(NODE_TYPES, range(1, LARGEST + 1), range(1, LARGEST + 1))
    sizes = [every.simulate(*cell) for cell in grid]
    meeting = [size.price_per_hour for size in sizes if size.meets]
    assert (best.price_per_hour if best else None) == min(meeting, default=None)
    assert len(told) == len(search.simulated) < len(sizes) / 2
    if best:
        assert best.meets
        assert best.run.attainment >= 0.9
        for cheaper in search.why_not_cheaper(best, NODE_TYPES):
            assert cheaper.price_per_hour < best.price_per_hour
            assert not cheaper.meets
            assert "within its target for" in cheaper.reason


def test_a_target_out_of_reach_and_bad_values() -> None:
    trace = random_trace(random.Random(1), 50, 50.0)
    conductor = ConductorConfig(slo=SLO(1e-3, 0.1))
    search = CapacitySearch(trace, conductor, attainment=0.9, max_nodes=4)
    assert search.cheapest(NODE_TYPES[:1]) is None
    assert [(size.prefill, size.decode) for size in search.simulated] == [(1, 1), (2, 2), (4, 4)]
    with pytest.raises(SimulatorError, match=r"`attainment` is a share .* at most 1, got 1\.5"):
        CapacitySearch(trace, conductor, attainment=1.5, max_nodes=4)
    with pytest.raises(SimulatorError, match="`max_nodes` of a pool must be at least 1, got 0"):
        CapacitySearch(trace, conductor, attainment=0.9, max_nodes=0)
