"""Hit rate by cache capacity and eviction policy: `python -m experiments.cache_capacity --trace=trace.jsonl`.

One cache, infinitely fast, requests in order of arrival. Belady's optimum is told the future: the ceiling, and how much
of the way from LRU to it a policy goes is its `gap_closed`.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from tqdm import tqdm

from experiments.common.flags import define_integers, define_texts
from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table
from kvcache.eviction import POLICIES
from serving.simulator.errors import SimulatorError
from serving.simulator.hit_rates import OPTIMUM, named_policy, replay_hits
from serving.workload.errors import TraceError
from serving.workload.requests import Trace
from serving.workload.traces import read_trace

BASELINE = "lru"
TRACE = flags.DEFINE_string("trace", None, "Trace to replay, a Mooncake JSONL file with block ids.", required=True)
START = flags.DEFINE_integer("start", 0, "Requests of the trace to skip first.", lower_bound=0)
LIMIT = flags.DEFINE_integer("limit", None, "Requests to take from the trace; by default all.", lower_bound=1)
POLICY_NAMES = define_texts("policies", [*POLICIES, OPTIMUM], "Eviction policies to compare; belady is the optimum.")
CAPACITIES = define_integers(
    "capacities", [1000, 1953, 5859, 10_000, 19_531, 30_000, 50_000, 100_000], "Sizes of the cache in blocks."
)


def _measure(trace: Trace, names: Sequence[str], capacities: Sequence[int]) -> list[dict[str, Any]]:
    for name in names:
        named_policy(name, 1, trace)
    rows = []
    with tqdm(total=len(names) * len(capacities), desc="caches") as progress:
        for name in names:
            progress.set_postfix_str(name)
            for capacity in capacities:
                hits = replay_hits(trace, named_policy(name, capacity, trace))
                rows.append(
                    {
                        "policy": name,
                        "capacity_blocks": capacity,
                        "capacity_tokens": capacity * trace.block_size,
                        "hit_rate": hits.rate,
                        "hit_tokens": hits.tokens,
                        "block_hit_rate": hits.blocks / hits.all_blocks,
                    }
                )
                progress.update()
    return rows


def _gaps(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to each row how much of the way from LRU to the optimum it goes, where both were measured and differ."""
    rate = {(row["policy"], row["capacity_blocks"]): row["hit_rate"] for row in rows}
    for row in rows:
        low, high = (rate.get((name, row["capacity_blocks"])) for name in (BASELINE, OPTIMUM))
        gap = high - low if low is not None and high is not None else 0.0
        row["gap_closed"] = (row["hit_rate"] - low) / gap if low is not None and gap > 0 else None


def _table(rows: Sequence[dict[str, Any]], field: str, title: str) -> None:
    table: dict[str, dict[str, Any]] = {}
    for row in rows:
        table.setdefault(row["policy"], {"policy": row["policy"]})[str(row["capacity_blocks"])] = row[field]
    print_table([*table.values()], title)


def _best_online(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        held = best.get(str(row["capacity_blocks"]))
        if row["policy"] != OPTIMUM and (held is None or row["hit_rate"] > held["hit_rate"]):
            best[str(row["capacity_blocks"])] = {key: row[key] for key in ("policy", "hit_rate", "gap_closed")}
    return best


def _run(trace: Trace, out: pathlib.Path, meta: dict[str, Any]) -> None:
    references = sum(len(request.keys) for request in trace.requests)
    if not references:
        raise app.UsageError(f"{trace.name} has no block ids, so nothing can be hit; use a trace with `hash_ids`.")
    names = list(dict.fromkeys(POLICY_NAMES.value))
    rows = _measure(trace, names, sorted(set(CAPACITIES.value)))
    _gaps(rows)
    about = f"{trace.name}: {len(trace.requests)} requests, {references} block references"
    _table(rows, "hit_rate", f"Hit rate by capacity in blocks; {about}; {', '.join(trace.notes) or 'read as it is'}")
    if {BASELINE, OPTIMUM} <= set(names):
        _table(rows, "gap_closed", f"Share of the way from {BASELINE} to {OPTIMUM}")
    from experiments.common.plots import save_curves

    curves = {n: [(r["capacity_tokens"], r["hit_rate"]) for r in rows if r["policy"] == n] for n in names}
    save_curves(out / "hit_rate.png", f"Hit rate, {trace.name}", "tokens", "hit rate", curves, logarithmic=True)
    write_result(out, meta, rows, {"block_references": references, "best_online": _best_online(rows)})


def main() -> None:
    out, meta = start_result()
    trace = read_trace(TRACE.value, start=START.value, limit=LIMIT.value)
    _run(trace, out, meta)


if __name__ == "__main__":
    run(main, TraceError, SimulatorError)
