"""The planner against exhaustive search, its fast search against its exact one, and clear refusals."""

import dataclasses
import functools
import itertools
import random

import numpy as np
import pytest

from attention_offload.costs.knobs import A_PRIORI, IDEAL
from attention_offload.costs.model_table import load_shape
from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.devices import Device, load_devices
from attention_offload.errors import CapacityError, OffloadError
from attention_offload.planner.goals import Goal
from attention_offload.planner.rates import PrefillDeployment, attained_rate, decode_rate, largest, prefill_rate
from attention_offload.planner.search import Plan, search
from attention_offload.planner.space import DecodeOption, Space

DEVICES = load_devices()
LLAMA3 = load_shape("llama3-70b")
CHAT = DecodeWorkload(
    name="chat",
    mean_prompt=1000.0,
    mean_generated=200.0,
    context=1100.0,
    context_spread=0.5,
    reserved=1200.0,
    prompts=(200.0, 600.0, 2200.0),
)


def random_device(rng: random.Random, name: str) -> Device:
    return Device(
        name=name,
        kind=rng.choice(["gpu", "gpu", "cpu"]),
        flops={"bfloat16": rng.uniform(50, 1000) * 1e12},
        memory_bytes=rng.uniform(10, 200) * 1e9,
        memory_bandwidth=rng.uniform(0.5, 8) * 1e12,
        link_bandwidth=rng.uniform(30, 900) * 1e9,
        network_bandwidth=rng.uniform(1, 50) * 1e9,
        price_per_hour=rng.uniform(0.2, 10),
    )


def random_case(rng: random.Random) -> tuple[Goal, Space]:
    shape = load_shape(rng.choice(["llama-13b", "llama3-8b", "llama-33b", "mixtral-8x7b"]))
    workload = DecodeWorkload(
        name="random",
        mean_prompt=rng.uniform(100, 4000),
        mean_generated=rng.uniform(10, 500),
        context=rng.uniform(200, 5000),
        context_spread=rng.uniform(0, 1),
    )
    goal = Goal(
        workload=workload,
        budget_per_hour=rng.uniform(5, 40),
        ttft_slo_s=rng.uniform(0.2, 10),
        tbt_slo_s=rng.uniform(0.02, 0.2),
        attainment=rng.choice([0.5, 0.9]),
        hit_rate=rng.choice([0.0, 0.4]),
        knobs=rng.choice([A_PRIORI, IDEAL]),
    )
    space = Space(
        shapes=[shape],
        devices=[random_device(rng, name) for name in ("x", "y")],
        dense_counts=(1, 2),
        attention_counts=rng.choice([(1,), (1, 2)]),
        expert_counts=rng.choice([(), (1,)]),
        in_flight=rng.choice([(1,), (2,), (2, 3)]),
        partitions=(rng.choice(["head", "request", "sequence"]),),
        helpers=rng.choice([(), (1,)]),
    )
    return goal, space


def exhaustive(goal: Goal, space: Space) -> dict[float, float]:
    """Price to goodput of every pair of pools, of every pair of instances: no pruning and no reasoning."""
    found: dict[float, float] = {}

    def add(prefill: PrefillDeployment, option: DecodeOption) -> None:
        try:
            rate = decode_rate(option.deployment, option.shape, goal)
        except OffloadError:
            return
        weights = option.shape.weight_bytes
        if rate is None or 0.9 * prefill.count * prefill.device.memory_bytes <= weights:
            return
        p, d = prefill.price_per_hour, option.deployment.price_per_hour
        for prefills in range(1, int(goal.budget_per_hour / p) + 1):
            carried = prefill_rate(prefill, prefills, option.shape, goal)
            for decodes in range(1, int((goal.budget_per_hour - prefills * p) / d) + 1):
                if prefills >= decodes * option.helpers and carried > 0:
                    price, rps = prefills * p + decodes * d, min(carried, decodes * rate.rps)
                    found[price] = max(rps, found.get(price, 0.0))

    options = [*space.coupled(), *space.experts(), *space.offloaded(goal.workload.context_spread)]
    for prefill, option in itertools.product(space.prefill(), options):
        add(prefill, option)
    for option in space.partial(goal.knobs.helper_prefill_slowdown):
        if option.helped_by:
            add(option.helped_by, option)
    return found


@pytest.mark.parametrize("cases", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_search_is_exact_on_small_cases(cases: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Both sides rate the same instances; what is compared is what they make of the rates.
    for name, function in (("decode_rate", decode_rate), ("prefill_rate", prefill_rate)):
        kept = functools.lru_cache(function)
        monkeypatch.setattr(f"attention_offload.planner.search.{name}", kept)
        monkeypatch.setitem(globals(), name, kept)
    rng = random.Random(0)
    plans_found = 0
    for _ in range(cases):
        goal, space = random_case(rng)
        all_pairs = exhaustive(goal, space)
        try:
            plans = search(goal, space)
        except OffloadError:
            assert not all_pairs
            continue
        plans_found += 1
        best: dict[float, float] = {}
        for price in sorted(all_pairs):
            if all_pairs[price] > max(best.values(), default=0.0) * (1 + 1e-9):
                best[price] = all_pairs[price]
        assert [plan.goodput_rps for plan in plans] == pytest.approx(list(best.values()))
        assert [plan.price_per_hour for plan in plans] == pytest.approx(list(best))
    assert plans_found > 0.3 * cases


def test_the_fast_search_comes_close_to_the_exact_one() -> None:
    devices = [DEVICES[name] for name in ("h100", "h20", "l40s", "cpu")]
    space = Space(shapes=[LLAMA3], devices=devices, attention_counts=range(1, 13), partitions=("sequence",))
    for slo in (0.06, 0.15):
        goal = Goal(workload=CHAT, budget_per_hour=100.0, ttft_slo_s=5.0, tbt_slo_s=slo)

        def best(plans: list[Plan]) -> float:
            return max(plan.requests_per_dollar for plan in plans)

        assert best(search(goal, space, exact_limit=0)) >= 0.99 * best(search(goal, space))


def test_search_is_deterministic() -> None:
    goal, space = (
        Goal(workload=CHAT, budget_per_hour=40.0, ttft_slo_s=5.0, tbt_slo_s=0.1),
        Space(shapes=[LLAMA3], devices=[DEVICES["h100"], DEVICES["h20"]]),
    )
    assert search(goal, space, exact_limit=0, seed=3) == search(goal, space, exact_limit=0, seed=3)


def test_plans_keep_their_promises() -> None:
    goal = Goal(workload=CHAT, budget_per_hour=60.0, ttft_slo_s=5.0, tbt_slo_s=0.08, demand_rps=20.0)
    plans = search(goal, Space(shapes=[LLAMA3, LLAMA3.quantised(kv="int8")], devices=[DEVICES["h100"], DEVICES["h20"]]))
    for plan in plans:
        assert plan.price_per_hour <= goal.budget_per_hour
        assert plan.tbt_s <= goal.tbt_slo_s
        assert plan.goodput_rps <= goal.demand_rps
    assert plans[-1].goodput_rps == 20.0
    assert plans[-1].binds == "demand"


def test_a_looser_target_or_a_larger_budget_never_hurts() -> None:
    space = Space(shapes=[LLAMA3], devices=[DEVICES["h100"], DEVICES["h20"]])

    def most(**changes: float) -> float:
        goal = dataclasses.replace(Goal(workload=CHAT, budget_per_hour=40.0, ttft_slo_s=3.0, tbt_slo_s=0.06), **changes)
        return search(goal, space)[-1].goodput_rps

    assert most() <= most(budget_per_hour=60.0)
    assert most() <= most(tbt_slo_s=0.1)
    assert most() <= most(ttft_slo_s=6.0)
    assert most() <= most(hit_rate=0.5)


def test_more_prefill_instances_carry_more_than_their_share() -> None:
    goal = Goal(workload=CHAT, budget_per_hour=60.0, ttft_slo_s=1.0, tbt_slo_s=0.08)
    pool = PrefillDeployment(DEVICES["h100"], 2)
    rates = [prefill_rate(pool, count, LLAMA3, goal) / count for count in (1, 2, 4, 8)]
    assert rates == sorted(rates)


@pytest.mark.parametrize(("fullest", "dispersion"), [(1, 1.0), (12, 1.0), (60, 1.0), (60, 4.0)])
def test_attained_rate_is_that_of_a_simulated_queue(fullest: int, dispersion: float) -> None:
    """Arrivals in groups of `dispersion` at a queue whose speed saturates; how many find it not yet full."""
    batches = np.arange(1, fullest + 1)
    speeds = batches / (0.5 + 0.05 * batches)
    workload = dataclasses.replace(CHAT, context_spread=0.0)
    goal = dataclasses.replace(
        Goal(workload=workload, budget_per_hour=1.0, ttft_slo_s=1.0, tbt_slo_s=1.0), dispersion=dispersion
    )
    rate, mean = attained_rate(batches.astype(float), speeds, goal)
    rng, group = random.Random(0), int(dispersion)
    held, now, occupied, room, arrivals = 0, 0.0, 0.0, 0, 0
    while arrivals < 60_000:
        served = speeds[min(held, fullest) - 1] / group if held else 0.0
        wait = rng.expovariate(rate / group + served)
        occupied += wait * min(held, fullest)
        now += wait
        if rng.random() * (rate / group + served) < rate / group:
            arrivals += 1
            room += held + group <= fullest
            held += group
        else:
            held -= group
    assert room / arrivals == pytest.approx(goal.attainment, abs=0.02)
    assert occupied / now == pytest.approx(mean, rel=0.1)


def test_rooms_grow_less_than_the_rates_that_they_allow() -> None:
    """Twice the room carries more than twice the rate, and bursts or unequal lengths cost some of it."""
    speeds = np.array([1.0, 100.0])

    def rate(fullest: float, dispersion: float = 1.0) -> float:
        goal = dataclasses.replace(
            Goal(workload=CHAT, budget_per_hour=1.0, ttft_slo_s=1.0, tbt_slo_s=1.0), dispersion=dispersion
        )
        return attained_rate(np.array([1.0, fullest]), speeds * fullest / 100, goal)[0]

    assert rate(200) > 2 * rate(100) > 4 * rate(50)
    assert rate(100, 1.0) > rate(100, 3.0) > rate(100, 10.0)


def test_largest() -> None:
    for limit in range(-1, 12):
        assert largest(lambda n, limit=limit: n <= limit, 2, 9) == min(max(limit, 1), 9)


@pytest.mark.parametrize(
    ("goal", "space", "error", "message"),
    [
        (
            lambda: Goal(workload=CHAT, budget_per_hour=-5, ttft_slo_s=1, tbt_slo_s=1),
            None,
            OffloadError,
            r"`budget_per_hour` must be positive, got -5",
        ),
        (
            lambda: Goal(workload=CHAT, budget_per_hour=5, ttft_slo_s=1, tbt_slo_s=1, hit_rate=1.0),
            None,
            OffloadError,
            r"`hit_rate` .* got 1.0",
        ),
        (None, lambda: Space(shapes=[LLAMA3], devices=[]), OffloadError, r"needs at least one device"),
        (
            None,
            lambda: Space(shapes=[LLAMA3], devices=[load_devices("paper")["a100"]]),
            OffloadError,
            r"Device `a100` has no price; add one in a device file",
        ),
        (
            None,
            lambda: Space(shapes=[LLAMA3], devices=[DEVICES["h100"]], partitions=("pages",)),
            OffloadError,
            r"No partition `pages`",
        ),
        (
            lambda: Goal(workload=CHAT, budget_per_hour=100, ttft_slo_s=5, tbt_slo_s=0.1),
            lambda: Space(shapes=[LLAMA3], devices=[DEVICES["rtx3090"]], dense_counts=(1, 2, 4)),
            CapacityError,
            r"fits on nothing offered within \$100/h. For example: The weights of llama3-70b are 141.1 GB, but 1x",
        ),
        (
            lambda: Goal(workload=CHAT, budget_per_hour=100, ttft_slo_s=5, tbt_slo_s=0.001),
            lambda: Space(shapes=[LLAMA3], devices=[DEVICES["h100"]]),
            OffloadError,
            r"No plan meets TTFT 5 s, TBT 0.001 s, \$100/h. Raise the budget or a target",
        ),
    ],
)
def test_refusals(goal, space, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        search(
            goal() if goal else Goal(workload=CHAT, budget_per_hour=100, ttft_slo_s=5, tbt_slo_s=0.1),
            space() if space else Space(shapes=[LLAMA3], devices=[DEVICES["h100"]]),
        )
