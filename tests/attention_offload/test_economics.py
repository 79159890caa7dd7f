"""Whether offloading pays, against the rates of both sides; and the price at which it stops paying."""

import dataclasses

import pytest

from attention_offload.costs.knobs import MODERN
from attention_offload.costs.model_table import load_shape
from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.devices import load_devices
from attention_offload.planner.economics import DOES_NOT, EVEN, PAYS, weigh
from attention_offload.planner.goals import Goal

DEVICES = load_devices()
LLAMA3 = load_shape("llama3-70b")
GOAL = Goal(
    workload=DecodeWorkload.from_means("w", 4000.0, 200.0),
    budget_per_hour=60.0,
    ttft_slo_s=1e3,
    tbt_slo_s=0.1,
    knobs=MODERN,
)


def test_break_even_price_is_where_the_gain_is_gone() -> None:
    h100, h20 = DEVICES["h100"], DEVICES["h20"]
    case = weigh(GOAL, [LLAMA3], [h100], [h20])
    assert case is not None
    assert case.gain == pytest.approx(case.offloaded.requests_per_dollar / case.coupled.requests_per_dollar - 1)
    assert case.break_even_price is not None
    assert (case.break_even_price > h20.price_per_hour) == (case.gain > 0)
    assert case.verdict == (PAYS if case.gain > 0.05 else EVEN if case.gain > -0.05 else DOES_NOT)
    dearer = dataclasses.replace(h20, price_per_hour=case.break_even_price)
    again = weigh(dataclasses.replace(GOAL, budget_per_hour=1e3), [LLAMA3], [h100], [dearer])
    assert again is not None
    # At that price another split may be the best one, but that one still breaks even.
    assert again.gain >= -1e-9


def test_slow_memory_does_not_pay_and_what_does_not_fit_is_none() -> None:
    slow = weigh(GOAL, [LLAMA3], [DEVICES["h100"]], [DEVICES["cpu"]])
    assert slow is not None
    assert slow.verdict == DOES_NOT
    assert weigh(GOAL, [load_shape("llama-65b")], [DEVICES["l40s"]], [DEVICES["rtx4090"]]) is not None
    cheap = dataclasses.replace(GOAL, budget_per_hour=1.0)
    assert weigh(cheap, [LLAMA3], [DEVICES["h100"]], [DEVICES["h20"]]) is None
