"""Fig 12 and 14: where a step's time goes without pipelining, and what overlapping K and V saves of it."""

from collections.abc import Mapping
from typing import Any

from attention_offload.costs.deployments import max_batch
from attention_offload.costs.knobs import FITTED
from attention_offload.paper.setups import COMPUTE, EQUAL_COST, lamina, paper_shape
from papers.comparison import Comparison, PaperTable, compare_points, statement

_STEPS = 8


def figure_12() -> PaperTable:
    """Dense, attention and network time against the batch, at contexts of 4096 and 8192 tokens."""
    rows: list[Comparison] = []
    curves: list[Mapping[str, Any]] = []
    for model in EQUAL_COST:
        shape, deployment = paper_shape(model), lamina(model, in_flight=1)
        for context in (4096, 8192):
            steps = [deployment.decode_step(shape, batch, context, FITTED) for batch in _batches(model, context)]
            small, large = steps[0], steps[-1]
            for step in steps:
                parts = {"dense": step.dense_s, "attention": step.attention_s, "network": step.network_s}
                for part, seconds in (parts | {"TBT": step.tbt_s}).items():
                    curves.append(_point("figure_12", f"{model}, l={context}: {part}", step.batch, "ms", 1e3 * seconds))
            flat = large.dense_s / small.dense_s - 1
            shares = small.dense_s / small.tbt_s, large.dense_s / large.tbt_s
            summed = large.dense_s + large.attention_s + large.network_s
            where = f"{model}, l = {context}"
            rows += [
                statement(f"dense time dominates a small batch, {where}", shares[0] > 0.5, f"{shares[0]:.0%} of TBT"),
                statement(f"attention and network grow past it, {where}", shares[1] < 0.5, f"{shares[1]:.0%} of TBT"),
                statement(
                    f"dense time stays nearly constant, {where}",
                    flat < 0.25,
                    f"{flat:+.0%} at a batch of {large.batch:.0f}; the ridge is at {COMPUTE.ridge():.0f}",
                ),
                statement(
                    f"TBT is below the sum of its parts, {where}",
                    large.tbt_s < summed,
                    f"{large.tbt_s * 1e3:.0f} against {summed * 1e3:.0f} ms",
                ),
            ]
    return PaperTable("Fig 12: breakdown of a step, no pipelining (fitted)", tuple(rows), tuple(curves))


def figure_14() -> PaperTable:
    """TBT saved by sending q before k and v are computed, context 4096."""
    rows: list[Comparison] = []
    curves: list[Mapping[str, Any]] = []
    for model, most in (("llama-65b", 0.132), ("llama3-70b", 0.035)):
        shape, deployment = paper_shape(model), lamina(model, in_flight=1)
        saved = []
        for batch in _batches(model, 4096):
            on = deployment.decode_step(shape, batch, 4096, FITTED).tbt_s
            off = deployment.decode_step(shape, batch, 4096, FITTED.changed(overlap=False)).tbt_s
            saved.append(1 - on / off)
            curves.append(_point("figure_14", model, batch, "TBT saved (%)", 100 * saved[-1]))
        rows += [
            compare_points(f"largest saving, {model}", most, max(saved), 0.025, note="up to", same_order=True),
            statement(
                f"the saving grows with the batch, {model}",
                saved[-1] >= saved[0],
                f"{saved[0]:.1%} at the smallest, {saved[-1]:.1%} at the largest batch; the model hides a time that is "
                "nearly constant, as reading the K and V weights binds it, while TBT grows",
            ),
        ]
    return PaperTable("Fig 14: saving by overlap (fitted)", tuple(rows), tuple(curves))


def _batches(model: str, context: int) -> list[int]:
    most = max_batch(lamina(model), paper_shape(model), context, FITTED)
    return sorted({max(1, round(most * step / _STEPS)) for step in range(1, _STEPS + 1)} | {min(4, most)})


def _point(figure: str, series: str, batch: float, y_name: str, y: float) -> Mapping[str, Any]:
    return {"figure": figure, "series": series, "x_name": "batch", "x": batch, "y_name": y_name, "y": y}
