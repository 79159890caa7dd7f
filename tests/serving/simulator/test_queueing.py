"""Known results of queueing theory, conservation and determinism."""

import dataclasses
import random

import pytest

from serving.conductor import ConductorConfig
from serving.conductor.admission import ADMISSIONS
from serving.conductor.estimators import TimeEstimator
from serving.conductor.placement import PLACEMENTS
from serving.request import TraceRequest
from serving.simulator.config import ClusterConfig
from serving.simulator.performance import mooncake_a800
from serving.simulator.simulation import Simulation
from serving.workload.requests import Trace
from tests.serving.simulator.equivalence import random_trace


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_mean_wait_is_that_of_m_d_1(load: float) -> None:
    rng = random.Random(1)
    performance = mooncake_a800()
    service_s = performance.costs.prefill_s(4096, 0)
    now, requests = 0.0, []
    for index in range(60_000):
        now += rng.expovariate(load / service_s)
        requests.append(TraceRequest(id=str(index), arrival_s=now, input_tokens=4096, output_tokens=1))
    result = Simulation(ClusterConfig(prefill=1, decode=1), performance).run(Trace("poisson", tuple(requests)))
    waits = [outcome.ttft_s - service_s for outcome in result.outcomes if outcome.ttft_s is not None]
    # Pollaczek-Khinchine with constant service; 60,000 arrivals leave a few per cent of noise at load 0.8.
    assert sum(waits) / len(waits) == pytest.approx(load * service_s / (2 * (1 - load)), rel=0.06)


@pytest.mark.parametrize("admission", ADMISSIONS)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_request_ends_once_and_the_same_way_again(placement: str, admission: str) -> None:
    trace = random_trace(random.Random(3), 300, 8.0)
    conductor = ConductorConfig(placement=placement, admission=admission, queue_order="shortest", seed=5)
    config = ClusterConfig(
        prefill=2, decode=2, conductor=conductor, host_blocks=400, ssd_blocks=200, failures=((9.0, 1), (12.0, 3))
    )
    first, again = (Simulation(config, mooncake_a800()).run(trace) for _ in range(2))
    assert first == again
    assert [outcome.id for outcome in first.outcomes] == [request.id for request in trace.requests]
    for outcome, request in zip(first.outcomes, trace.requests, strict=True):
        assert outcome.outcome in ("completed", "rejected", "failed")
        assert outcome.finished_s >= request.arrival_s
        assert 0 <= outcome.hit_tokens < request.input_tokens
        if outcome.outcome == "completed":
            assert outcome.output_tokens == request.output_tokens


def test_nothing_is_left_in_the_cluster_after_a_run() -> None:
    trace = random_trace(random.Random(4), 300, 8.0)
    simulation = Simulation(ClusterConfig(prefill=3, decode=2, host_blocks=100), mooncake_a800())
    simulation.run(trace)
    for node in simulation.mirror.decode:
        assert (node.assigned, node.assigned_tokens, node.present, node.present_tokens) == (0, 0, 0, 0)
    assert simulation.conductor.occupancy.running == 0
    held = sum(len(cache) for cache in simulation.cluster.world.caches)
    counted = sum(
        simulation.mirror.directory.holders(block).bit_count()
        for block in {block for request in trace.requests for block in request.keys}
    )
    assert held == counted <= 300


def test_learned_estimates_find_the_true_costs() -> None:
    trace = random_trace(random.Random(6), 2000, 3.0)
    performance = mooncake_a800()
    simulation = Simulation(ClusterConfig(prefill=2, decode=2, conductor=ConductorConfig(learn=True)), performance)
    wrong = dataclasses.replace(performance.costs, prefill_base=0.0, prefill_token=3e-4)
    simulation.conductor.estimator = TimeEstimator(wrong, learn=True)
    simulation.run(trace)
    for tokens in (1000, 5000, 15000):
        learned_s = simulation.conductor.estimator.model.prefill_s(tokens, 0)
        assert learned_s == pytest.approx(performance.costs.prefill_s(tokens, 0), rel=0.05)
