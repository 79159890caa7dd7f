"""Plans of the cost model in the simulator: the same steps, equal to token by token, and verdicts of both kinds."""

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention_offload.costs.deployments import CoupledDeployment, DecodeDeployment, OffloadedDeployment
from attention_offload.costs.experts import ExpertPoolDeployment
from attention_offload.costs.knobs import A_PRIORI
from attention_offload.costs.model_table import load_shape
from attention_offload.costs.partial import PartiallyOffloadedDeployment
from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.devices import load_devices
from attention_offload.planner.goals import Goal
from attention_offload.planner.rates import PrefillDeployment
from attention_offload.planner.search import Plan, search
from attention_offload.planner.space import Space
from serving.conductor import SLO
from serving.planning.confirm import CONFIRMED, REFUTED, at_rate, confirm, sustained_rate
from serving.planning.deployment import decode_table, plan_performance
from serving.planning.trace_goal import arrival_dispersion, trace_goal, trace_rps
from serving.request import TraceRequest
from serving.workload.requests import Trace
from tests.serving.simulator.equivalence import compare, random_trace

DEVICES = load_devices()
H100, H20, L40S = (DEVICES[name] for name in ("h100", "h20", "l40s"))
LLAMA3, MIXTRAL = load_shape("llama3-70b"), load_shape("mixtral-8x7b")
DEPLOYMENTS = (
    (OffloadedDeployment(dense=H100, dense_count=2, attention=H20, attention_count=4), LLAMA3),
    (
        OffloadedDeployment(
            dense=H100, dense_count=2, attention=H20, attention_count=3, in_flight=3, partition="sequence"
        ),
        LLAMA3.quantised(kv="int8"),
    ),
    (
        OffloadedDeployment(
            dense=H100,
            dense_count=2,
            attention=L40S,
            attention_count=8,
            in_flight=2,
            partition="request",
            context_spread=0.7,
        ),
        LLAMA3,
    ),
    (PartiallyOffloadedDeployment(device=H100, count=4, helper=H100, helper_count=4, helper_tp=4), LLAMA3),
    (ExpertPoolDeployment(CoupledDeployment(H20, 2), H100, 2), MIXTRAL),
    (CoupledDeployment(H100, 4), dataclasses.replace(LLAMA3, window=1000, windowed_layers=40)),
)
CHAT = Goal(
    workload=DecodeWorkload(
        name="chat",
        mean_prompt=1000.0,
        mean_generated=200.0,
        context=1100.0,
        context_spread=0.5,
        reserved=1200.0,
        prompts=(200.0, 600.0, 2200.0),
    ),
    budget_per_hour=100.0,
    ttft_slo_s=5.0,
    tbt_slo_s=0.1,
)


def poisson_trace(count: int, rate: float, seed: int = 0, group: int = 1) -> Trace:
    rng, now, requests = random.Random(seed), 0.0, []
    for index in range(count):
        now += rng.expovariate(rate / group) if index % group == 0 else 0.0
        requests.append(
            TraceRequest(
                id=str(index), arrival_s=now, input_tokens=rng.randint(200, 3000), output_tokens=rng.randint(50, 300)
            )
        )
    return Trace("poisson", tuple(requests))


@pytest.mark.parametrize(("deployment", "shape"), DEPLOYMENTS)
def test_decode_table_is_the_step_of_the_deployment(deployment: DecodeDeployment, shape) -> None:
    table = decode_table(deployment, shape, CHAT, largest=100)
    rng = random.Random(0)
    for _ in range(200):
        batch, context = rng.randint(1, 100), rng.randint(64, 20_000)
        expected = deployment.decode_step(shape, batch, context, A_PRIORI).tbt_s
        # Knots are 15 % apart, so a kink of the step between two of them is cut by at most a few per cent.
        assert table.decode_s(batch, batch * context) == pytest.approx(expected, rel=0.03)
    knot = table.contexts[5]
    at_knot = deployment.decode_step(shape, 16, knot, A_PRIORI)
    assert table.decode_s(16, 16 * knot) == pytest.approx(at_knot.tbt_s, rel=1e-9)


@pytest.mark.parametrize(("deployment", "shape"), DEPLOYMENTS)
def test_offloaded_decode_equals_token_by_token(deployment: DecodeDeployment, shape) -> None:
    plan = Plan(
        prefill=PrefillDeployment(H100, 4),
        prefill_count=2,
        decode=deployment,
        decode_count=2,
        shape=shape,
        goodput_rps=1.0,
        batch=20.0,
        max_batch=60,
        tbt_s=0.1,
        ttft_s=1.0,
        answerable=1.0,
        binds="",
    )
    performance = plan_performance(plan, CHAT)
    rng = random.Random(7)
    for _ in range(15):
        trace = random_trace(rng, rng.randint(5, 40), rng.choice([0.3, 2.0, 20.0]))
        capacity = rng.choice([30_000, performance.kv_capacity_tokens])
        sizes = {"prefill": rng.randint(1, 3), "decode": rng.randint(1, 3), "coupled": 0}
        compare(trace, dataclasses.replace(performance, kv_capacity_tokens=capacity), sizes, blocks=100)


def test_times_that_are_fitted_are_close() -> None:
    plan = search(CHAT, Space(shapes=[LLAMA3], devices=[H100, H20]))[-1]
    costs = plan_performance(plan, CHAT).costs
    expected = [plan.prefill.seconds(LLAMA3, tokens, 0.0, A_PRIORI) for tokens in CHAT.workload.prompts]
    fitted = [costs.prefill_s(int(tokens), 0) for tokens in CHAT.workload.prompts]
    assert sum(fitted) == pytest.approx(sum(expected), rel=0.02)
    # A line cannot follow the knee between memory and compute, where the shortest prompts are.
    assert fitted == pytest.approx(expected, rel=0.15)
    step_s = plan.decode.decode_step(LLAMA3, plan.batch, 1100, A_PRIORI).tbt_s
    assert costs.decode_s(plan.batch, plan.batch * 1100) == pytest.approx(step_s, rel=0.15)


def test_attention_leaves_less_of_the_network_to_prompts() -> None:
    plan = Plan(
        prefill=PrefillDeployment(H100, 8),
        prefill_count=1,
        decode=DEPLOYMENTS[0][0],
        decode_count=1,
        shape=LLAMA3,
        goodput_rps=1.0,
        batch=200.0,
        max_batch=300,
        tbt_s=0.1,
        ttft_s=1.0,
        answerable=1.0,
        binds="",
    )
    alone = dataclasses.replace(plan, decode=CoupledDeployment(H20, 4))
    offloaded_s, alone_s = (plan_performance(p, CHAT).costs.transfer_token for p in (plan, alone))
    assert alone_s == pytest.approx(LLAMA3.kv_bytes_per_token / (4 * 50e9 * A_PRIORI.network.efficiency))
    assert alone_s < offloaded_s < 10 * alone_s


def test_a_plan_is_confirmed_and_an_exaggerated_one_refuted() -> None:
    trace = poisson_trace(1500, 6.0)
    goal = trace_goal(trace, A_PRIORI, SLO(5.0, 0.1), 100.0, 0.9, host_tokens=0)
    plan = search(goal, Space(shapes=[LLAMA3], devices=[H100, H20], helpers=()))[-1]
    tried: list[float] = []
    fair = confirm(plan, goal, trace, 0, tried.append)
    assert (fair.verdict, tried[0]) == (CONFIRMED, pytest.approx(plan.goodput_rps))
    assert fair.run.goodput_rps >= 0.9 * plan.goodput_rps
    assert fair.sustained_rps >= plan.goodput_rps
    bold = confirm(dataclasses.replace(plan, goodput_rps=3 * fair.sustained_rps), goal, trace, 0)
    assert bold.verdict == REFUTED
    assert bold.sustained_rps == pytest.approx(fair.sustained_rps, rel=0.1)
    assert "within its target for" in bold.reason
    assert confirm(plan, goal, trace, 0) == fair


@given(st.floats(0.1, 100.0), st.floats(0.1, 10.0))
def test_sustained_rate_is_bracketed(planned: float, ratio: float) -> None:
    limit = planned * ratio
    found = sustained_rate(planned, ratio >= 1, lambda rate: rate <= limit)
    assert found <= limit * (1 + 1e-9)
    assert found >= limit / 1.06
    assert sustained_rate(planned, False, lambda rate: False) == 0.0


def test_what_a_trace_demands() -> None:
    poisson, bursts = poisson_trace(20_000, 5.0), poisson_trace(20_000, 5.0, group=4)
    assert trace_rps(poisson) == pytest.approx(5.0, rel=0.03)
    assert arrival_dispersion(poisson, 10.0) == pytest.approx(1.0, rel=0.15)
    assert arrival_dispersion(bursts, 10.0) == pytest.approx(4.0, rel=0.2)
    clock = Trace(
        "clock",
        tuple(TraceRequest(id=str(i), arrival_s=float(i), input_tokens=10, output_tokens=10) for i in range(1000)),
    )
    assert arrival_dispersion(clock, 10.0) == pytest.approx(0.0, abs=1e-3)
    assert arrival_dispersion(clock, 500.0) == 1.0
    slower = at_rate(poisson, 2.5)
    assert trace_rps(slower) == pytest.approx(2.5)
    assert np.diff([r.arrival_s for r in slower.requests]).min() >= 0
