"""Decode with attention on the host's CPU and everything else on the accelerator, beside a model in one place.

    python -m experiments.bench_pair --shape=llama3-8b --layers=8 --batches=1,8 --contexts=4096

Layers of random weights in the shape of a preset. On a machine without an accelerator both are CPU devices, which says
nothing about a pair, and is there to try the command.
"""

import jax
from absl import flags

from experiments.common import pair_speed
from experiments.common.flags import define_integers
from experiments.common.process import with_huge_pages
from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table
from model.presets import PRESETS

SHAPE = flags.DEFINE_enum("shape", "llama3-8b", sorted(PRESETS), "Whose layers.")
LAYERS = flags.DEFINE_integer("layers", 8, "How many of them.", lower_bound=1)
BATCHES = define_integers("batches", [1, 8], "Batch sizes.")
CONTEXTS = define_integers("contexts", [4096], "Tokens of KV of each row.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Measurements; the median is reported.", lower_bound=1)


def main() -> None:
    with_huge_pages()
    out, meta = start_result()
    device, host = jax.devices()[0], jax.devices("cpu")[-1]
    pairs = [pair_speed.Pair(device, device), pair_speed.Pair(device, host)]
    rows = [
        pair_speed.measure(PRESETS[SHAPE.value], LAYERS.value, batch, context, pair, REPEATS.value)
        for batch in BATCHES.value
        for context in CONTEXTS.value
        for pair in pairs
    ]
    print_table(rows, title=f"decode of {LAYERS.value} layers of {SHAPE.value}")
    write_result(out, meta, rows)


if __name__ == "__main__":
    run(main)
