"""One picture of a replay: load, latencies and reuse."""

import pathlib
from typing import Any

import numpy as np

from experiments.common.plots import plt
from serving.replay import Replay
from serving.workload.outcomes import RequestOutcome


def save_replay_plots(path: pathlib.Path, title: str, run: Replay, found: dict[str, Any]) -> None:
    """Writes six panels as a PNG; `found` are the totals of `replay_totals`."""
    figure, ((flow, load, reuse), (ttft, tbt, cost)) = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    figure.suptitle(title)
    served = sorted((o for o in run.outcomes if o.ttft_s is not None), key=lambda o: o.arrival_s)
    _flow(flow, run.outcomes)
    _load(load, run)
    _reuse(reuse, served, found)
    _cumulative(ttft, "TTFT", [o.ttft_s for o in served if o.ttft_s is not None], found["ttft_s"])
    _cumulative(tbt, "TBT (longest 10 % of gaps)", [o.tbt_s for o in served if o.tbt_s is not None], found["tbt_s"])
    _cost(cost, served)
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _flow(axes: Any, outcomes: list[RequestOutcome]) -> None:
    for name, times in (
        ("arrived", [o.arrival_s for o in outcomes]),
        ("first token", [o.arrival_s + o.ttft_s for o in outcomes if o.ttft_s is not None]),
        ("ended", [o.finished_s for o in outcomes]),
    ):
        axes.step(sorted(times), np.arange(1, len(times) + 1), where="post", label=name)
    axes.set(title="Requests", xlabel="s", ylabel="cumulative")
    axes.legend()


def _load(axes: Any, run: Replay) -> None:
    times = [sample.time_s for sample in run.samples]
    for name in ("running", "waiting"):
        values = [getattr(sample.counters, name) for sample in run.samples]
        if None not in values:
            axes.step(times, values, where="post", label=name)
    usage = [sample.counters.kv_usage for sample in run.samples]
    axes.set(title="In the server", xlabel="s", ylabel="requests")
    if usage and None not in usage:
        right = axes.twinx()
        right.fill_between(times, 100 * np.array(usage, float), step="post", alpha=0.15, color="gray")
        right.set(ylabel="KV pages in use, %", ylim=(0, 100))
    axes.legend()


def _reuse(axes: Any, served: list[RequestOutcome], found: dict[str, Any]) -> None:
    axes.set(title="Prefix hits", xlabel="arrival, s", ylabel="% of prompt tokens", ylim=(0, 100))
    if not served or found["hit_rate"] is None:
        return
    times = np.array([o.arrival_s for o in served])
    hits, prompts = (np.array([getattr(o, name) for o in served], float) for name in ("hit_tokens", "input_tokens"))
    axes.scatter(times, 100 * hits / prompts, s=10, alpha=0.5, label="a request")
    axes.plot(times, 100 * np.cumsum(hits) / np.cumsum(prompts), color="black", label="all so far")
    if (limit := found["unlimited_hit_rate"]) is not None:
        axes.axhline(100 * limit, color="gray", linestyle=":", label="a cache that forgets nothing, all")
    axes.legend()


def _cumulative(axes: Any, name: str, values: list[float], quantiles: dict[str, float | None]) -> None:
    axes.set(title=name, xlabel="ms", ylabel="% of requests", ylim=(0, 100))
    if not values:
        return
    axes.step(1e3 * np.sort(values), 100 * np.arange(1, len(values) + 1) / len(values), where="post")
    for quantile, style in (("p50", "-"), ("p90", "--"), ("p99", ":")):
        at_ms = 1e3 * (quantiles[quantile] or 0.0)
        axes.axvline(at_ms, color="gray", linestyle=style, label=f"{quantile} {at_ms:.3g} ms")
    axes.set_xscale("log")
    axes.legend()


def _cost(axes: Any, served: list[RequestOutcome]) -> None:
    computed = [o.input_tokens - o.hit_tokens for o in served]
    points = axes.scatter(
        computed, [1e3 * (o.ttft_s or 0.0) for o in served], c=[o.arrival_s for o in served], s=12, cmap="viridis"
    )
    axes.set(title="TTFT by prompt tokens computed", xlabel="prompt tokens not reused", ylabel="TTFT, ms")
    if served:
        axes.figure.colorbar(points, ax=axes, label="arrival, s")
