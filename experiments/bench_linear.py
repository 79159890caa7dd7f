"""Speed of `linear`: every weight of a model once, by rows and implementation, in gigabytes of weight per core-second.

    python -m experiments.bench_linear --model=bench-58m --dtype=bfloat16 --rows=1,8,32,512

`ratio_to_xla` is XLA's CPU time over ours, in the same run.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from experiments.common.flags import define_integers
from experiments.common.process import with_huge_pages
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.kernels.linear import IMPLEMENTATIONS, linear
from model.presets import preset
from model.transformer import Transformer, split

MODEL = flags.DEFINE_string("model", "bench-58m", "Preset whose weights are read.")
DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Dtype of the weights and of their input x.")
ROWS = define_integers("rows", [1, 2, 4, 8, 16, 32, 64, 128, 512], "Rows of the input x.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Measurements of each case; the median is reported.", lower_bound=1)


@functools.partial(jax.jit, static_argnums=2)
def _multiply_all(inputs: dict[int, jax.Array], weights: list[jax.Array], implementation: str) -> list[jax.Array]:
    return [linear(inputs[weight.shape[1]], weight, implementation) for weight in weights]


def _cpu_seconds(inputs: dict[int, jax.Array], weights: list[jax.Array], implementation: str) -> float:
    seconds = []
    for _ in range(REPEATS.value + 2):
        start = time.process_time()
        jax.block_until_ready(_multiply_all(inputs, weights, implementation))
        seconds.append(time.process_time() - start)
    return statistics.median(seconds[2:])


def main() -> None:
    with_huge_pages()
    out, meta = start_result()
    model = Transformer(preset(MODEL.value), nnx.Rngs(SEED.value), DTYPE.value)
    # The embedding is looked up, not multiplied.
    weights = [leaf for leaf in split(model)[1] if leaf.ndim == 2 and leaf is not model.embed_tokens.weight[...]]
    gigabytes = sum(weight.nbytes for weight in weights) / 1e9
    rows = []
    for count in ROWS.value:
        inputs = {size: jnp.ones((count, size), DTYPE.value) for size in {weight.shape[1] for weight in weights}}
        seconds = {name: _cpu_seconds(inputs, weights, name) for name in IMPLEMENTATIONS}
        for name, took in seconds.items():
            row = {"implementation": name, "dtype": DTYPE.value, "rows": count, "time_ms": took * 1e3}
            rows.append(row | {"gb_s": gigabytes / took, "ratio_to_xla": seconds["xla"] / took})
    print_table(rows, title=f"linear, all weights of {MODEL.value} ({gigabytes:.3f} GB)")
    write_result(out, meta, rows)


if __name__ == "__main__":
    run(main)
