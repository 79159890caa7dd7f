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

SHAPE = flags.DEFINE_enum("shape", "llama3-8b", sorted(PRESETS), "Preset whose layers are measured.")
LAYERS = flags.DEFINE_integer("layers", 8, "Layers of the model that is measured.", lower_bound=1)
BATCHES = define_integers("batches", [1, 8], "Sequences that decode together, one measurement for each number.")
CONTEXTS = define_integers("contexts", [4096], "Tokens of KV of each sequence, one measurement for each number.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Measurements of each case; the median is reported.", lower_bound=1)


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
