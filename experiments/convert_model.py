"""Cut a model's decoding step into dense slices and attention slices: `python -m experiments.convert_model`.

Nothing is computed, so any preset can be cut on a laptop. The table shows the programs that remain, and what crosses
between the two sides and stays on the dense side in each layer; cut.png shows the order in which they run.
"""

import collections
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from attention_offload.converter import ConversionError, Side, SplitStep
from attention_offload.executor.engine_step import cut_engine_step
from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table
from kvcache.layout import KVLayout
from model.config import ConfigError, ModelConfig
from model.presets import preset
from model.transformer import Transformer, split
from serving.engine.batch import step_inputs
from serving.engine.buckets import Bucket
from serving.engine.scheduler import StepPlan

MODEL = flags.DEFINE_string("model", "llama3-70b", "Preset whose step is cut.")
BATCH = flags.DEFINE_integer("batch", 8, "Sequences that decode in the step.", lower_bound=1)
CONTEXT = flags.DEFINE_integer("context", 8192, "Most tokens of one sequence, prompt and output.", lower_bound=1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["float32", "bfloat16"], "Dtype of weights, activations and KV.")
_PAGE_SIZE = 64
_DRAWN_LAYERS = 3


def _cut(config: ModelConfig) -> SplitStep:
    dtype = jnp.dtype(DTYPE.value)
    definition, weights = split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), dtype)))
    pages = -(-CONTEXT.value // _PAGE_SIZE)
    layout = KVLayout(
        num_layers=config.num_layers,
        num_pages=pages * BATCH.value,
        page_size=_PAGE_SIZE,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype.name,
    )
    bucket = Bucket(BATCH.value, 0, 0)
    inputs = step_inputs(StepPlan((), ()), bucket, layout, pages)
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(inputs))
    abstract = tuple(jax.ShapeDtypeStruct(weight.shape, weight.dtype) for weight in weights)
    return cut_engine_step(definition, config, bucket, None, abstract, layout, shapes)


def _programs(cut: SplitStep) -> list[dict[str, Any]]:
    slices = collections.Counter(piece.executable for piece in cut.slices)
    sides = {piece.executable: piece.side.name.lower() for piece in cut.slices}
    return [
        {
            "program": index,
            "side": sides[index],
            "slices": slices[index],
            "equations": len(executable.equations),
            "arguments": executable.parameters,
            "results": len(executable.outputs),
        }
        for index, executable in enumerate(cut.executables)
    ]


def _layers(cut: SplitStep) -> list[dict[str, Any]]:
    """One row per attention slice: what comes to it, what it sends back, and what waits meanwhile."""
    rows = []
    crossings = collections.defaultdict(list)
    for crossing in cut.crossings():
        crossings[crossing.level].append(crossing)
    for piece in cut.slices:
        if piece.side is Side.ATTENTION:
            there, back = crossings[piece.level], crossings[piece.level + 1]
            context = [cut.program.nbytes(value) for value in cut.context(piece.level - 1)]
            rows.append(
                {
                    "layer": piece.level // 2,
                    "there": ", ".join(shape for crossing in there for shape in crossing.shapes),
                    "there_bytes": sum(crossing.nbytes for crossing in there),
                    "back": ", ".join(shape for crossing in back for shape in crossing.shapes),
                    "back_bytes": sum(crossing.nbytes for crossing in back),
                    "context_bytes": sum(context),
                }
            )
    return rows


def _save_picture(path: pathlib.Path, cut: SplitStep, layers: list[dict[str, Any]]) -> None:
    """Two lanes of slices, left to right in the order in which they run, with the bytes that cross between them."""
    from experiments.common.plots import plt

    shown = [piece for piece in cut.slices if piece.level < 2 * _DRAWN_LAYERS + 1]
    figure, axes = plt.subplots(figsize=(2.2 * len(shown), 3.2), layout="constrained")
    for piece in shown:
        lane = 1 if piece.side is Side.DENSE else 0
        name = f"program {piece.executable}\n{len(cut.executables[piece.executable].equations)} equations"
        axes.text(piece.level, lane, name, ha="center", va="center", bbox={"boxstyle": "round", "fc": "0.93"})
        if piece.level:
            row = layers[(piece.level - 1) // 2]
            crossing = row["there_bytes"] if lane == 0 else row["back_bytes"]
            axes.annotate(
                "", (piece.level - 0.1, lane + (0.2 if lane == 0 else -0.2)),
                (piece.level - 0.9, 0.8 if lane == 0 else 0.2), arrowprops={"arrowstyle": "->"},
            )  # fmt: skip
            axes.text(piece.level - 0.5, 0.5, f"{crossing / 1024:g} KiB", ha="center", backgroundcolor="white")
    axes.set(xlim=(-0.7, shown[-1].level + 0.7), ylim=(-0.4, 1.4), yticks=[0, 1], yticklabels=["attention", "dense"])
    axes.set(xticks=[], title=f"{MODEL.value}: the first {len(shown)} of {len(cut.slices)} slices")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    out, meta = start_result()
    config = preset(MODEL.value)
    cut = _cut(config)
    programs, layers = _programs(cut), _layers(cut)
    crossing = sum(row["there_bytes"] + row["back_bytes"] for row in layers)
    groups = config.num_heads // config.num_kv_heads
    width = config.num_heads * config.head_dim
    formula = (2 + 2 / groups) * jnp.dtype(DTYPE.value).itemsize * BATCH.value * width * config.num_layers
    totals = {
        "slices": len(cut.slices),
        "programs": programs,
        "crossing_bytes": crossing,
        "formula_bytes": int(np.rint(formula)),
        "context_bytes": max(row["context_bytes"] for row in layers),
    }
    print_table(programs, f"{MODEL.value}, batch {BATCH.value}: {len(cut.slices)} slices, {len(programs)} programs")
    print_table([layers[0], layers[-1]], "What crosses in the first layer and in the last")
    print_table([{name: totals[name] for name in ("crossing_bytes", "formula_bytes", "context_bytes")}], "A step")
    write_result(out, meta, layers, totals)
    _save_picture(out / "cut.png", cut, layers)


if __name__ == "__main__":
    run(main, ConversionError, ConfigError)
