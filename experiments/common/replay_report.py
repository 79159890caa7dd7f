"""What is said of a replay at its end: totals, a table, a picture, `requests.jsonl` and `result.json`."""

import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.common.formats import count, milliseconds, percent
from experiments.common.replay_plots import save_replay_plots
from experiments.common.results import write_result
from experiments.common.tables import print_table
from serving.replay import Replay
from serving.workload.outcomes import FAILED, distribution, totals, write_requests
from serving.workload.requests import Trace


def report_replay(
    out: pathlib.Path, meta: Mapping[str, Any], run: Replay, *, ttft_slo_s: float, tbt_slo_s: float, cpu_s: float
) -> dict[str, Any]:
    """Writes everything into `out`, prints the table and returns the totals."""
    found = replay_totals(run, ttft_slo_s, tbt_slo_s) | {"cpu_s": cpu_s}
    title = f"{run.trace.name}: {'; '.join(run.trace.notes) or 'as it is'}"
    position = {request.id: index for index, request in enumerate(run.trace.requests)}
    write_requests(out / "requests.jsonl", sorted(run.outcomes, key=lambda outcome: position[outcome.id]))
    save_replay_plots(out / "replay.png", title, run, found)
    samples = [{"time_s": sample.time_s} | vars(sample.counters) for sample in run.samples]
    write_result(out, meta, samples, found)
    print_table(summary_rows(found), title)
    return found


def replay_totals(run: Replay, ttft_slo_s: float, tbt_slo_s: float) -> dict[str, Any]:
    """The totals of `simulate_cluster`, and what only a live run has; `None` for what the server does not tell."""
    found = totals(run.outcomes, ttft_slo_s, tbt_slo_s)
    duration_s = max(found["duration_s"], 1e-9)
    served = [outcome for outcome in run.outcomes if outcome.ttft_s is not None]
    return found | {
        "failed": sum(outcome.outcome == FAILED for outcome in run.outcomes),
        "hit_rate": found["hit_rate"] if run.hits_told else None,
        "unlimited_hit_rate": unlimited_hit_rate(run.trace),
        "request_rps": found["completed"] / duration_s,
        "prompt_tok_s": sum(outcome.input_tokens for outcome in served) / duration_s,
        "output_tok_s": sum(outcome.output_tokens for outcome in served) / duration_s,
        "arrival_skew_s": distribution(run.skews_s) | {"max": max(run.skews_s, default=None)},
        "preemptions": run.counters.preemptions,
        "compiles_after_warm_up": run.counters.compiles,
        "engine_steps": run.counters.steps,
        "prefill_time_s_mean": None,
        "wasted_prefill_s": None,
        "events": run.pieces,
        "errors": dict(run.errors),
    }


def unlimited_hit_rate(trace: Trace) -> float | None:
    """Share of prompt tokens that a cache which forgets nothing would have; `None` where the trace has no blocks.

    Whole blocks only, and at least the last token of a prompt is computed.
    """
    if not any(request.keys for request in trace.requests):
        return None
    seen: set[int] = set()
    hits = 0
    for request in trace.requests:
        whole = request.keys[: request.input_tokens // trace.block_size]
        reusable = whole[: (request.input_tokens - 1) // trace.block_size]
        hits += next((i for i, block in enumerate(reusable) if block not in seen), len(reusable)) * trace.block_size
        seen.update(whole)
    return hits / sum(request.input_tokens for request in trace.requests)


def summary_rows(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """The totals as a person reads them."""
    hits = f"{percent(found['hit_rate'])} of prompt tokens"
    if (limit := found["unlimited_hit_rate"]) is not None:
        hits += f" (a cache that forgets nothing: {percent(limit)})"
    rows = {
        "requests": f"{found['requests']}: {found['completed']} completed, {found['rejected']} rejected, "
        f"{found['failed']} failed",
        "throughput": f"{found['request_rps']:.2f} requests/s, {found['prompt_tok_s']:.0f} prompt tokens/s, "
        f"{found['output_tok_s']:.0f} output tokens/s, for {found['duration_s']:.0f} s",
        "TTFT": _quantiles(found["ttft_s"]),
        "TBT": _quantiles(found["tbt_s"]),
        "prefix hits": hits,
        "preemptions": count(found["preemptions"]),
        "compiles after warm-up": count(found["compiles_after_warm_up"]),
        "arrival skew": _quantiles(found["arrival_skew_s"]),
    }
    errors = {f"error, {times} times": text for text, times in found["errors"].items()}
    return [{"": name, "value": value} for name, value in (rows | errors).items()]


def _quantiles(found: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {milliseconds(value)}" for name, value in found.items())
