"""Where offloading attention pays at today's prices, and where it does not: `python -m experiments.offload_economics`.

Decode only, requests per dollar within a TBT target. First every model on every workload of the paper with devices that
have a public price; then one model with attention on ever cheaper and slower kinds of device.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from attention_offload.costs.knobs import KNOBS
from attention_offload.costs.model_table import load_shape
from attention_offload.devices import PRICE_BOOKS, Device, DeviceTable, load_devices
from attention_offload.errors import OffloadError
from attention_offload.paper.setups import TRACES
from attention_offload.planner.economics import weigh
from attention_offload.planner.goals import Goal
from experiments.common.flags import define_float, define_texts
from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table

MODELS = define_texts(
    "models",
    ["llama3-8b", "llama-65b", "llama3-70b", "qwen3-235b-a22b", "deepseek-v3"],
    "Models of the first table: presets, or folders of a config.json.",
)
SCENARIO_MODELS = define_texts(
    "scenario_models", ["llama-65b", "llama3-70b"], "Models of the second table: presets, or folders of a config.json."
)
DEVICES = define_texts(
    "devices",
    ["h100", "h200", "b200", "a100", "l40s"],
    "Devices for the weights, and for attention in the first table.",
)
DEVICE_FILE = flags.DEFINE_string(
    "device_file", None, "TOML file that adds devices to the device table, or replaces their figures."
)
PRICES = flags.DEFINE_enum("prices", "market", PRICE_BOOKS, "Price book that devices are paid by.")
KNOB_PRESET = flags.DEFINE_enum(
    "knobs", "modern", tuple(KNOBS), "Named set of assumptions that the cost model starts from."
)
TBT_SLO_S = define_float("tbt_slo_s", 0.1, "Limit of TBT, in seconds.")
BUDGET = define_float("budget_per_hour", 200.0, "Most dollars per hour for one decode instance.")


def _row(model: str, trace: str, offer: str, devices: Sequence[Device], attention: Sequence[Device]) -> dict[str, Any]:
    knobs = KNOBS[KNOB_PRESET.value]
    goal = Goal(
        workload=TRACES[trace][1], budget_per_hour=BUDGET.value, ttft_slo_s=1e3, tbt_slo_s=TBT_SLO_S.value, knobs=knobs
    )
    case = weigh(goal, [load_shape(model)], devices, attention)
    row: dict[str, Any] = {"model": model, "trace": trace, "attention on": offer}
    if case is None:
        return row | {"verdict": "does not fit"}
    return row | {
        "verdict": case.verdict,
        "gain": case.gain,
        "coupled": case.coupled.option.deployment.label,
        "coupled_per_dollar": case.coupled.requests_per_dollar,
        "offloaded": case.offloaded.option.deployment.label,
        "offloaded_per_dollar": case.offloaded.requests_per_dollar,
        "offloaded_binds": case.offloaded.rate.binds,
        "attention_price": case.attention.price_per_hour,
        "break_even_price": case.break_even_price,
    }


def _scenarios(table: DeviceTable) -> dict[str, Sequence[Device]]:
    """Pools of attention devices, from what anyone can rent to what nobody can."""
    slow = [dataclasses.replace(table[name], network_bandwidth=25e9 / 8) for name in ("rtx3090", "rtx4090")]
    return {
        "H20, price estimated": [table["h20"]],
        "consumer cards, 200 Gb/s each": [table["rtx3090"], table["rtx4090"]],
        "consumer cards, 25 Gb/s each": slow,
        "CPU servers": [table["cpu"]],
        "in-memory processing, price assumed": [table["aim"]],
    }


def main() -> None:
    out, meta = start_result()
    table = load_devices(PRICES.value, DEVICE_FILE.value)
    devices = [table[name] for name in DEVICES.value]
    today = [(model, trace, "the same devices", devices) for model in MODELS.value for trace in TRACES]
    offers = _scenarios(table).items()
    others = [(model, trace, *offer) for model in SCENARIO_MODELS.value for trace in TRACES for offer in offers]
    rows = [
        _row(model, trace, offer, devices, attention)
        for model, trace, offer, attention in tqdm([*today, *others], desc="cases")
    ]
    where = f"{KNOB_PRESET.value} knobs, {PRICES.value} prices, TBT {TBT_SLO_S.value:g} s"
    print_table(rows[: len(today)], f"Attention on devices that anyone can rent; {where}")
    print_table(rows[len(today) :], "Attention on other devices")
    verdicts = Counter(f"{row['attention on']}: {row['verdict']}" for row in rows)
    print_table([{"attention on": name, "cases": count} for name, count in sorted(verdicts.items())], "Totals")
    write_result(out, meta, rows, {"verdicts": verdicts})


if __name__ == "__main__":
    run(main, OffloadError)
