"""What the Conductor promises of order, fairness, refusals and its own errors, seen in simulated clusters."""

import collections
import dataclasses
import random
import statistics

import pytest

from serving.conductor import SLO, ConductorConfig
from serving.conductor.estimators import MeanError, TimeEstimator
from serving.conductor.links import Links
from serving.request import TraceRequest
from serving.simulator.config import ClusterConfig
from serving.simulator.performance import mooncake_a800
from serving.simulator.result import SimulationResult
from serving.simulator.simulation import Simulation
from serving.workload.requests import Trace

A800 = mooncake_a800()
COSTS = A800.costs


def run(
    conductor: ConductorConfig, requests: list[TraceRequest], prefill: int = 1, decode: int = 1
) -> SimulationResult:
    return Simulation(ClusterConfig(prefill=prefill, decode=decode, conductor=conductor), A800).run(
        Trace("t", tuple(requests))
    )


def test_mean_errors_are_those_of_their_definition() -> None:
    rng = random.Random(0)
    pairs = [(rng.uniform(0, 2), rng.choice([0.0, rng.uniform(0.5, 2)])) for _ in range(200)]
    error = MeanError()
    for predicted, observed in pairs:
        error.observe(predicted, observed)
    assert error.absolute == pytest.approx(statistics.mean(abs(p - o) for p, o in pairs))
    assert error.observations == 200
    relative = MeanError()
    for predicted, observed in pairs:
        if observed:
            relative.observe(predicted, observed)
    assert relative.relative == pytest.approx(statistics.mean(abs(p - o) / o for p, o in pairs if o))


def test_only_what_was_observed_has_an_error() -> None:
    result = run(ConductorConfig(), [TraceRequest(id="0", arrival_s=0.0, input_tokens=4000, output_tokens=1)])
    assert result.errors == pytest.approx({"prefill": 0.0, "queue_s": 0.0, "ttft_s": 0.0})
    predicted = run(
        ConductorConfig(admission="request_level"),
        [TraceRequest(id="0", arrival_s=0.0, input_tokens=4000, output_tokens=1)],
    )
    assert predicted.errors["output_tokens"] == pytest.approx(255.0)


def test_every_estimate_reports_its_error() -> None:
    """Half of what instances really take is believed, so prefill is off by a half, and queues by some of theirs."""
    rng, now, requests = random.Random(1), 0.0, []
    for index in range(300):
        now += rng.expovariate(3.5)
        requests.append(
            TraceRequest(
                id=str(index),
                arrival_s=now,
                input_tokens=4000,
                output_tokens=50,
                keys=(0, *range(8 * index + 1, 8 * index + 8)),
            )
        )
    simulation = Simulation(ClusterConfig(prefill=2, decode=1), A800)
    half = {field.name: getattr(COSTS, field.name) / 2 for field in dataclasses.fields(COSTS)}
    simulation.conductor.estimator = TimeEstimator(dataclasses.replace(COSTS, **half))
    errors = simulation.run(Trace("t", tuple(requests))).errors
    assert errors["prefill"] == pytest.approx(0.5)
    assert errors["tbt"] == pytest.approx(0.5, abs=0.1)
    assert errors["transfer_s"] == pytest.approx(COSTS.transfer_s(512) / 2, rel=0.05)
    assert errors["queue_s"] > 0
    assert errors["ttft_s"] > COSTS.prefill_s(4000, 512) / 2


def test_decode_times_are_learned_too() -> None:
    rng, now, requests = random.Random(2), 0.0, []
    for index in range(1500):
        now += rng.expovariate(3.0)
        requests.append(
            TraceRequest(
                id=str(index), arrival_s=now, input_tokens=rng.randint(100, 8000), output_tokens=rng.randint(2, 300)
            )
        )
    simulation = Simulation(ClusterConfig(prefill=4, decode=3, conductor=ConductorConfig(learn=True)), A800)
    wrong = dataclasses.replace(COSTS, decode_base=0.0, decode_sequence=1e-3)
    simulation.conductor.estimator = TimeEstimator(wrong, learn=True)
    simulation.run(Trace("t", tuple(requests)))
    for batch in (5, 20, 40):
        learned_s = simulation.conductor.estimator.model.decode_s(batch, 4000 * batch)
        assert learned_s == pytest.approx(COSTS.decode_s(batch, 4000 * batch), rel=0.05)


def test_a_more_urgent_request_overtakes_all_that_wait() -> None:
    requests = [
        TraceRequest(id=str(i), arrival_s=0.1 * i, input_tokens=8000, output_tokens=1, priority=i % 3) for i in range(9)
    ]
    outcomes = run(ConductorConfig(), requests).outcomes
    served = sorted(outcomes, key=lambda outcome: outcome.finished_s)
    # The first one was alone when it came.
    assert [int(outcome.id) for outcome in served] == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    last_s = max(outcome.finished_s for outcome in outcomes)
    assert last_s == pytest.approx(9 * COSTS.prefill_s(8000, 0))


@pytest.mark.parametrize("chunk", [0, 1000])
def test_a_more_urgent_request_overtakes_on_coupled_nodes_too(chunk: int) -> None:
    requests = tuple(
        TraceRequest(id=str(i), arrival_s=0.1 * i, input_tokens=8000, output_tokens=1, priority=i % 3) for i in range(9)
    )
    config = ClusterConfig(
        prefill=0, decode=0, coupled=1, chunk=chunk, conductor=ConductorConfig(placement="least_loaded")
    )
    result = Simulation(config, A800).run(Trace("t", requests))
    served = sorted(result.outcomes, key=lambda outcome: outcome.finished_s)
    assert [int(outcome.id) for outcome in served] == [0, 3, 6, 1, 4, 7, 2, 5, 8]
    assert served[-1].finished_s == pytest.approx(9 * COSTS.prefill_s(8000, 0))


def flood() -> list[TraceRequest]:
    """One tenant sends twice what a node can compute, the other one a fifth of it."""
    service_s = COSTS.prefill_s(4000, 0)
    requests = [
        TraceRequest(id="0", arrival_s=i * service_s / 2, input_tokens=4000, output_tokens=1, tenant="flood")
        for i in range(200)
    ]
    requests += [
        TraceRequest(id="0", arrival_s=i * service_s * 5, input_tokens=4000, output_tokens=1, tenant="light")
        for i in range(20)
    ]
    requests.sort(key=lambda request: request.arrival_s)
    return [dataclasses.replace(request, id=str(i)) for i, request in enumerate(requests)]


def waits_s(fair: bool) -> dict[str, float]:
    requests = flood()
    waits = collections.defaultdict(list)
    for outcome, request in zip(run(ConductorConfig(fair=fair), requests).outcomes, requests, strict=True):
        waits[request.tenant].append(outcome.ttft_s - COSTS.prefill_s(4000, 0))
    return {tenant: statistics.mean(values) for tenant, values in waits.items()}


def test_a_tenant_within_its_share_hardly_notices_one_that_floods() -> None:
    fair, unfair = waits_s(fair=True), waits_s(fair=False)
    service_s = COSTS.prefill_s(4000, 0)
    # It waits for the one that runs and for hardly any other.
    assert fair["light"] < 1.5 * service_s
    assert unfair["light"] > 20 * service_s
    # No work is lost or gained: prompts of equal length wait as long on average in any order.
    mean = [(200 * waits["flood"] + 20 * waits["light"]) / 220 for waits in (fair, unfair)]
    assert mean[0] == pytest.approx(mean[1], rel=1e-6)


def test_tenants_that_want_more_than_there_is_get_the_same_work() -> None:
    """Three send three, two and one and a half times a node's capacity in prompts of 2,000, 4,000 and 8,000 tokens."""
    demands = {"a": (3.0, 2000), "b": (2.0, 4000), "c": (1.5, 8000)}
    requests = []
    for tenant, (load, tokens) in demands.items():
        gap_s = COSTS.prefill_s(tokens, 0) / load
        requests += [
            TraceRequest(id="0", arrival_s=i * gap_s, input_tokens=tokens, output_tokens=1, tenant=tenant)
            for i in range(int(60 / gap_s))
        ]
    requests.sort(key=lambda request: request.arrival_s)
    requests = [dataclasses.replace(request, id=str(i)) for i, request in enumerate(requests)]
    work_s = dict.fromkeys(demands, 0.0)
    # Decode nodes enough that there is room for the KV of all that wait.
    for outcome, request in zip(run(ConductorConfig(fair=True), requests, 1, 8).outcomes, requests, strict=True):
        assert outcome.outcome == "completed"
        if outcome.finished_s <= 60.0:
            work_s[request.tenant] += COSTS.prefill_s(request.input_tokens, 0)
    # The bound of start-time fair queueing: one request of the one and one of the other.
    assert max(work_s.values()) - min(work_s.values()) < COSTS.prefill_s(2000, 0) + COSTS.prefill_s(8000, 0)
    assert sum(work_s.values()) == pytest.approx(60.0, abs=COSTS.prefill_s(8000, 0))


def test_the_decode_instance_looks_again_and_what_it_refuses_is_waste() -> None:
    """Twenty come at once and one may decode; each is alone when it arrives: only the second look sees the others."""
    slo = SLO(1000.0, COSTS.decode_s(1, 3000))
    requests = [TraceRequest(id=str(i), arrival_s=0.01 * i, input_tokens=2000, output_tokens=400) for i in range(20)]
    late = run(ConductorConfig(admission="baseline", slo=slo), requests)
    completed = [outcome for outcome in late.outcomes if outcome.outcome == "completed"]
    assert late.rejections == {"tbt, after prefill": 20 - len(completed)}
    assert late.wasted_prefill_s == pytest.approx((20 - len(completed)) * COSTS.prefill_s(2000, 0))
    assert all(o.ttft_s is not None and o.tbt_s is None for o in late.outcomes if o.outcome == "rejected")


def test_early_rejection_refuses_before_prefill_when_decode_load_stands_still() -> None:
    slo = SLO(1000.0, COSTS.decode_s(3, 9000))
    # Three that decode long; then one at a time, when nothing is in prefill.
    requests = [TraceRequest(id=str(i), arrival_s=0.0, input_tokens=2000, output_tokens=2000) for i in range(3)]
    requests += [
        TraceRequest(id=str(3 + i), arrival_s=10.0 + i, input_tokens=2000, output_tokens=50) for i in range(20)
    ]
    early, late = (run(ConductorConfig(admission=name, slo=slo), requests) for name in ("early_rejection", "baseline"))
    assert early.rejections == {"tbt": 20}
    assert late.rejections == {"tbt, after prefill": 20}
    assert early.wasted_prefill_s == 0 < late.wasted_prefill_s


def test_a_refusal_says_what_would_have_been_and_when_to_come_again() -> None:
    simulation = Simulation(
        ClusterConfig(prefill=1, decode=1, conductor=ConductorConfig(admission="early_rejection", slo=SLO(1.0, 0.1))),
        A800,
    )
    refusal = simulation.conductor.schedule(
        TraceRequest(id="1", arrival_s=0.0, input_tokens=16_000, output_tokens=10), 0.0
    )
    assert refusal.reason == "ttft"
    assert refusal.predicted_ttft_s == pytest.approx(COSTS.prefill_s(16_000, 0))
    assert refusal.retry_after_s == pytest.approx(COSTS.prefill_s(16_000, 0) - 1.0)


def test_every_instance_has_a_load() -> None:
    simulation = Simulation(ClusterConfig(prefill=2, decode=2, conductor=ConductorConfig(slo=SLO(10.0, 0.2))), A800)
    assert simulation.conductor.loads(0.0) == (
        {"p0": 0.0, "p1": 0.0},
        {"d0": COSTS.decode_s(0, 0) / 0.2, "d1": COSTS.decode_s(0, 0) / 0.2},
    )
    simulation.arrive(TraceRequest(id="0", arrival_s=0.0, input_tokens=8000, output_tokens=10), 0.0)
    assert simulation.conductor.loads(0.5)[0]["p0"] == pytest.approx((COSTS.prefill_s(8000, 0) - 0.5) / 10)


def test_transfers_wait_for_sender_and_receiver() -> None:
    links, sender, receiver = Links([1] * 6), 0, 1
    assert [links.book(sender, other, 1.0, 0.0) for other in (2, 3)] == [1.0, 2.0]
    assert [links.book(other, receiver, 1.0, 0.0) for other in (4, 5)] == [1.0, 2.0]
    assert links.wait_s(sender, receiver, 0.5) == 1.5
    # Both directions at once.
    assert links.book(receiver, sender, 1.0, 0.0) == 1.0


def test_the_shortest_predicted_outputs_leave_the_waiting_room_first() -> None:
    """Two conversations, one of long and one of short answers; when both wait for decode, the short one goes first."""
    slo = SLO(1000.0, COSTS.decode_s(1.5, 6000))
    requests = []
    for turn in range(6):
        for talk, output in ((0, 600), (1, 20)):
            blocks = tuple(100 * talk + i for i in range(1 + turn))
            requests.append(
                TraceRequest(
                    id="0", arrival_s=100.0 * turn, input_tokens=512 * (1 + turn), output_tokens=output, keys=blocks
                )
            )
    # The last turns come while a stranger decodes; the long one comes first.
    requests.append(TraceRequest(id="0", arrival_s=999.0, input_tokens=512, output_tokens=100, keys=(9000,)))
    for talk, output in ((0, 600), (1, 20)):
        requests.append(
            TraceRequest(
                id="0",
                arrival_s=1000.0 + talk,
                input_tokens=512 * 7,
                output_tokens=output,
                keys=tuple(100 * talk + i for i in range(7)),
            )
        )
    requests = [dataclasses.replace(request, id=str(i)) for i, request in enumerate(requests)]
    started = {
        admission: [outcome.ttft_s for outcome in run(ConductorConfig(admission=admission, slo=slo), requests).outcomes]
        for admission in ("deferred", "shortest_output")
    }
    assert started["shortest_output"][-1] < started["shortest_output"][-2]
    assert started["deferred"][-1] > started["deferred"][-2]


@pytest.mark.parametrize("admission", ["deferred", "shortest_output"])
def test_a_request_waits_no_longer_than_its_ttft_allows(admission: str) -> None:
    slo = SLO(2.0, COSTS.decode_s(2, 4000))
    requests = [TraceRequest(id=str(i), arrival_s=0.05 * i, input_tokens=1000, output_tokens=300) for i in range(40)]
    result = run(ConductorConfig(admission=admission, slo=slo), requests)
    ends = sorted(outcome.finished_s for outcome in result.outcomes if outcome.outcome == "completed")
    for outcome in result.outcomes:
        if outcome.outcome == "rejected":
            # Told at the first end of a decode after its time was up.
            over_s = outcome.arrival_s + slo.ttft_s
            assert outcome.finished_s <= min((end for end in ends if end >= over_s), default=ends[-1]) + 1e-9
    assert 0 < len(ends) < 40
