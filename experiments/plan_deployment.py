"""What to rent for a model and a trace: `python -m experiments.plan_deployment --model=llama3-70b --trace=trace.jsonl`.

Searches prefill pools and decode instances (coupled, with attention on other devices, with experts on other devices,
with the help of prefill devices) for the frontier of price against goodput, then lets the best few serve the trace in
the cluster simulator.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from attention_offload.costs.deployments import PARTITIONS
from attention_offload.costs.knobs import KNOBS, load_knobs
from attention_offload.costs.model_table import load_shape
from attention_offload.costs.shapes import FORMAT_BYTES
from attention_offload.devices import PRICE_BOOKS, load_devices
from attention_offload.errors import OffloadError
from attention_offload.planner.search import Plan, search
from attention_offload.planner.space import Space
from experiments.common.flags import define_float, define_integers, define_names, define_texts
from experiments.common.plots import save_curves
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.config import ConfigError
from serving.conductor import SLO
from serving.planning.confirm import Confirmation, confirm
from serving.planning.trace_goal import trace_goal
from serving.workload.errors import TraceError
from serving.workload.requests import Trace
from serving.workload.traces import read_trace

MODEL = flags.DEFINE_string(
    "model", "llama3-70b", "Model that is served: a preset, or the folder of a Hugging Face config.json."
)
TRACE = flags.DEFINE_string("trace", None, "Trace to serve, a Mooncake JSONL or Azure CSV file.", required=True)
LIMIT = flags.DEFINE_integer("limit", None, "Requests to take from the trace; by default all.", lower_bound=1)
SPEED = define_float("speed", 1.0, "Offered load as a multiple of the trace's own.", lower_bound=1e-9)
BUDGET = define_float("budget_per_hour", 100.0, "Most dollars per hour for the whole deployment.")
TTFT_SLO_S = define_float("ttft_slo_s", 30.0, "Limit of TTFT, in seconds.")
TBT_SLO_S = define_float("tbt_slo_s", 0.1, "Limit of TBT, in seconds.")
ATTAINMENT = define_float("attainment", 0.9, "Share of the requests that must keep each limit.")
DEVICES = define_texts(
    "devices", ["h100", "h200", "h20", "a100", "l40s"], "Devices on offer, by their names in the device table."
)
DEVICE_FILE = flags.DEFINE_string(
    "device_file", None, "TOML file that adds devices to the device table, or replaces their figures."
)
PRICES = flags.DEFINE_enum("prices", "market", PRICE_BOOKS, "Price book that devices are paid by.")
KNOB_PRESET = flags.DEFINE_enum(
    "knobs", "a_priori", tuple(KNOBS), "Named set of assumptions that the cost model starts from."
)
MEASURED = flags.DEFINE_string("measured", None, "JSON or TOML file of measured knobs, which replace those of --knobs.")
DENSE = define_integers(
    "dense", [1, 2, 4, 8], "Tensor-parallel degrees of decode and of prefill to try.", lower_bound=1
)
ATTENTION = define_integers("attention", [1, 2, 4, 8], "Sizes of attention pools to try, in devices.", lower_bound=1)
EXPERTS = define_integers("experts", [1, 2, 4, 8], "Sizes of expert pools to try, in devices.", lower_bound=1)
IN_FLIGHT = define_integers("in_flight", [2, 3], "Batches in flight to try.", lower_bound=1)
PARTITION = define_names(
    "partition", ["head", "sequence"], PARTITIONS, "Ways to divide attention over an attention pool."
)
WEIGHTS = define_names("weights", ["bfloat16"], FORMAT_BYTES, "Formats of the weights to try.")
KV = define_names("kv", ["bfloat16"], FORMAT_BYTES, "Formats of the KV to try.")
HOST_TOKENS = flags.DEFINE_integer(
    "host_tokens", 3_000_000, "Tokens of KVCache in host memory of a prefill instance.", lower_bound=0
)
CONFIRM = flags.DEFINE_integer("confirm", 3, "Plans that serve the trace in the simulator, best first.", lower_bound=0)


def _space() -> Space:
    table = load_devices(PRICES.value, DEVICE_FILE.value)
    shape = load_shape(MODEL.value)
    return Space(
        shapes=[shape.quantised(weights, kv) for weights in WEIGHTS.value for kv in KV.value],
        devices=[table[name] for name in DEVICES.value],
        dense_counts=DENSE.value,
        attention_counts=ATTENTION.value,
        expert_counts=EXPERTS.value,
        in_flight=IN_FLIGHT.value,
        partitions=PARTITION.value,
    )


def _row(plan: Plan) -> dict[str, Any]:
    return {
        "price_per_hour": plan.price_per_hour,
        "goodput_rps": plan.goodput_rps,
        "requests_per_dollar": plan.requests_per_dollar,
        "prefill": f"{plan.prefill_count} * ({plan.prefill.label})",
        "decode": f"{plan.decode_count} * ({plan.decode.label})",
        "weights": plan.shape.weight_format,
        "kv": plan.shape.kv_format,
        "batch": plan.batch,
        "tbt_s": plan.tbt_s,
        "ttft_s": plan.ttft_s,
        "binds": plan.binds,
    }


def _tested_row(tested: Confirmation) -> dict[str, Any]:
    plan, run = tested.plan, tested.run
    return {
        "plan": plan.label,
        "kv": plan.shape.kv_format,
        "price_per_hour": plan.price_per_hour,
        "planned_rps": plan.goodput_rps,
        "simulated_rps": run.goodput_rps,
        "attainment": run.attainment,
        "ttft_attainment": run.ttft_attainment,
        "tbt_attainment": run.tbt_attainment,
        "ttft_p90_s": run.ttft_p90_s,
        "tbt_p90_s": run.tbt_p90_s,
        "hit_rate": run.hit_rate,
        "sustained_rps": tested.sustained_rps,
        "sustained_per_dollar": 3600 * tested.sustained_rps / plan.price_per_hour,
        "verdict": tested.verdict,
        "reason": tested.reason,
    }


def _best(plans: Sequence[Plan], count: int) -> list[Plan]:
    """The most goodput there is, and the best per dollar."""
    by_value = sorted(plans[:-1], key=lambda plan: -plan.requests_per_dollar)
    return [*by_value[: count - 1], plans[-1]] if count else []


def _save_plot(out: pathlib.Path, frontiers: dict[str, Sequence[Plan]], tested: Sequence[Confirmation]) -> None:
    series = {
        name: [(plan.price_per_hour, plan.goodput_rps) for plan in plans] for name, plans in frontiers.items() if plans
    }
    if tested:
        series["sustained in the simulator"] = sorted((t.plan.price_per_hour, t.sustained_rps) for t in tested)
    save_curves(out / "frontier.png", f"{MODEL.value} on {TRACE.value}", "$/h", "requests/s within targets", series)


def _plan(trace: Trace, out: pathlib.Path, meta: dict[str, Any]) -> None:
    knobs = load_knobs("measured" if MEASURED.value else KNOB_PRESET.value, MEASURED.value)
    slo = SLO(TTFT_SLO_S.value, TBT_SLO_S.value)
    goal = trace_goal(trace, knobs, slo, BUDGET.value, ATTAINMENT.value, HOST_TOKENS.value)
    space = _space()
    plans = search(goal, space, seed=SEED.value)
    coupled = dataclasses.replace(space, attention_counts=(), expert_counts=(), helpers=())
    try:
        alike = search(goal, coupled, seed=SEED.value)
    except OffloadError:
        alike = []
    print_table([_row(plan) for plan in plans], f"Frontier: {MODEL.value}, {trace.name}, {goal.knobs.name} knobs")
    tested = []
    chosen = _best(plans, CONFIRM.value)
    with tqdm(total=len(chosen), desc="simulated plans", disable=not chosen) as bar:
        for plan in chosen:

            def tell(rps: float, plan: Plan = plan) -> None:
                bar.set_postfix_str(f"{plan.label} at {rps:.3g} requests/s")

            tested.append(confirm(plan, goal, trace, HOST_TOKENS.value, tell))
            bar.update()
    rows = [_tested_row(one) for one in tested]
    if rows:
        print_table(rows, "Put to the test")
    best, without = (max((plan.requests_per_dollar for plan in of), default=None) for of in (plans, alike))
    totals = {
        "best_requests_per_dollar": best,
        "best_coupled_requests_per_dollar": without,
        "gain_over_coupled": best / without - 1 if best and without else None,
        "hit_rate_assumed": goal.hit_rate,
        "arrival_dispersion": goal.dispersion,
        "demand_rps": goal.demand_rps,
    }
    print_table([{"total": name, "value": value} for name, value in totals.items()])
    _save_plot(out, {"all": plans, "coupled only": alike}, tested)
    write_result(out, meta, [_row(plan) for plan in plans], totals | {"tested": rows})


def main() -> None:
    out, meta = start_result()
    _plan(read_trace(TRACE.value, limit=LIMIT.value, speed=SPEED.value), out, meta)


if __name__ == "__main__":
    run(main, OffloadError, TraceError, ConfigError)
