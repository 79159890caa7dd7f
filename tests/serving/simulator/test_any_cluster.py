"""Whatever a cluster is made of and whatever happens to it, requests, tokens and blocks are conserved."""

import dataclasses
import random

import pytest

from serving.conductor import SLO, ConductorConfig, RoleConfig
from serving.conductor.admission import ADMISSIONS
from serving.conductor.placement import PLACEMENTS
from serving.simulator.cache import EVICTIONS
from serving.simulator.config import ClusterConfig
from serving.simulator.performance import Performance, mooncake_a800
from serving.simulator.simulation import Simulation
from serving.workload.requests import Trace
from tests.serving.simulator.equivalence import random_trace


def any_conductor(rng: random.Random, roles: bool, learn: bool) -> ConductorConfig:
    quick = RoleConfig(interval_s=1.0, looks=rng.choice([1, 3]), cooldown_s=rng.choice([0.0, 10.0]))
    return ConductorConfig(
        placement=rng.choice(PLACEMENTS),
        admission=rng.choice(ADMISSIONS),
        slo=SLO(rng.choice([1.0, 30.0]), rng.choice([0.03, 0.06, 0.1])),
        queue_order=rng.choice(["fifo", "shortest"]),
        fair=rng.random() < 0.5,
        learned_limit=rng.random() < 0.3,
        learn=learn and rng.random() < 0.3,
        roles=quick if roles and rng.random() < 0.6 else None,
        seed=rng.randrange(100),
    )


def any_cluster(rng: random.Random) -> ClusterConfig:
    coupled = rng.random() < 0.25
    cpp = 1 if coupled else rng.choice([1, 1, 2, 3])
    if coupled:
        sizes = {"prefill": 0, "decode": 0, "coupled": rng.randint(1, 4)}
        instances = sizes["coupled"]
    else:
        sizes = {"prefill": cpp * rng.randint(1, 4), "decode": rng.randint(1, 4)}
        instances = sizes["prefill"] // cpp + sizes["decode"]

    def events() -> tuple[tuple[float, int], ...]:
        return tuple((rng.uniform(0, 25), rng.randrange(instances)) for _ in range(rng.choice([0, 0, 3, 12])))

    ssd = rng.choice([0, 50])
    return ClusterConfig(
        **sizes,
        cpp=cpp,
        prefill_chunk=rng.choice([100, 2048]),
        conductor=any_conductor(rng, roles=not coupled and cpp == 1, learn=cpp == 1),
        host_blocks=rng.choice([30, 1000] if ssd else [0, 30, 1000]),
        ssd_blocks=ssd,
        store_blocks=0 if coupled else rng.choice([0, 100]),
        eviction=rng.choice(EVICTIONS),
        layer_wise=rng.random() < 0.8,
        chunk=rng.choice([0, 128]) if coupled else 0,
        max_batch=rng.choice([2, 1024]),
        switch_s=rng.choice([0.0, 3.0]),
        failures=events(),
        joins=events(),
    )


def any_trace(rng: random.Random) -> Trace:
    trace = random_trace(rng, rng.randint(1, 100), rng.choice([1.0, 8.0, 30.0]))
    requests = (
        dataclasses.replace(request, tenant=rng.choice("abc"), priority=rng.choice([0, 0, 1]))
        for request in trace.requests
    )
    return dataclasses.replace(trace, requests=tuple(requests))


def any_performance(rng: random.Random) -> Performance:
    slow_or_fast = mooncake_a800(rng.choice([1e9, 87e9]))
    return dataclasses.replace(slow_or_fast, kv_capacity_tokens=rng.choice([40_000, 1_300_000]))


def check_requests(simulation: Simulation, trace: Trace, performance: Performance) -> None:
    result = simulation.run(trace)
    assert result == Simulation(simulation.cluster.config, performance).run(trace)
    assert [outcome.id for outcome in result.outcomes] == [request.id for request in trace.requests]
    for outcome, request in zip(result.outcomes, trace.requests, strict=True):
        assert outcome.outcome in ("completed", "rejected", "failed")
        assert outcome.finished_s >= request.arrival_s
        assert 0 <= outcome.hit_tokens < request.input_tokens
        if outcome.outcome == "completed":
            assert outcome.output_tokens == request.output_tokens
            assert (outcome.tbt_s is None) == (request.output_tokens == 1)
        else:
            assert outcome.output_tokens < request.output_tokens or outcome.outcome == "rejected"
    served = [outcome for outcome in result.outcomes if outcome.ttft_s is not None]
    assert sum(result.hits_by_tier.values()) == sum(outcome.hit_tokens for outcome in served)
    assert 0 <= result.wasted_prefill_s <= result.prefill_s + 1e-9


def check_leftovers(simulation: Simulation, trace: Trace) -> None:
    for node in simulation.mirror.decode:
        assert (node.assigned, node.assigned_tokens, node.present) == (0, 0, 0)
    conductor = simulation.conductor
    assert (conductor.in_flight, conductor.deferred, conductor.occupancy.running) == (0, 0, 0)
    assert not simulation.coordinator.busy
    assert not simulation.cluster.world.requests
    caches = [
        *simulation.cluster.world.caches,
        *([simulation.cluster.world.store.cache] if simulation.cluster.world.store else []),
    ]
    blocks = {block for request in trace.requests for block in request.keys}
    known = sum(simulation.mirror.directory.holders(block).bit_count() for block in blocks)
    assert sum(len(cache) for cache in caches) == known


@pytest.mark.parametrize("batch", range(8))
def test_nothing_is_lost_counted_twice_or_left_behind(batch: int) -> None:
    for seed in range(10 * batch, 10 * batch + 10):
        rng = random.Random(seed)
        trace, config, performance = any_trace(rng), any_cluster(rng), any_performance(rng)
        simulation = Simulation(config, performance)
        check_requests(simulation, trace, performance)
        check_leftovers(simulation, trace)
