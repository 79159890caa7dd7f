"""Times the sampler beside the usual spellings: a sort to truncate, Gumbel noise to draw, argmax for greedy.

    python -m experiments.bench_sampling

Both sides of a ratio are timed in the same run, in turns; each time is the median.
"""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.common.flags import define_integers
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.sampling import SamplingBatch, SamplingParams, sample

_ROWS = define_integers("rows", [1, 32], "Sequences that sample together.", lower_bound=1)
_VOCAB = define_integers("vocab", [32_000, 128_256], "Token ids of the vocabulary.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 11, "Timed calls of each sampler.", lower_bound=1)

_CASES = {
    "greedy": SamplingParams(temperature=0),
    "temperature": SamplingParams(temperature=0.8),
    "top_p": SamplingParams(temperature=0.8, top_p=0.9),
    "top_k, top_p": SamplingParams(temperature=0.8, top_k=50, top_p=0.9),
}


@functools.partial(jax.jit, static_argnames="params")
def _by_sorting(logits: jax.Array, keys: jax.Array, params: SamplingParams) -> jax.Array:
    """The same choice as usually written; computes no more than `params` needs."""
    if params.greedy:
        return jnp.argmax(logits, axis=-1)
    logits = logits / params.temperature
    if params.top_k or params.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        if params.top_k:
            ordered = jnp.where(jnp.arange(ordered.shape[1])[None] < params.top_k, ordered, -jnp.inf)
        probabilities = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.sum(jnp.cumsum(probabilities, axis=-1) - probabilities < params.top_p, axis=-1)
        edge = jnp.take_along_axis(ordered, kept[:, None] - 1, axis=1)
        logits = jnp.where(logits >= edge, logits, -jnp.inf)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:]))(keys)
    return jnp.argmax(logits + noise, axis=-1)


def _medians_ms(*calls: Callable[[], object]) -> list[float]:
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(_REPEATS.value + 1):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:  # the first call compiles
                times[index].append(1e3 * (time.perf_counter() - start))
    return [float(np.median(each)) for each in times]


def _measure(rows: int, vocab: int, name: str, params: SamplingParams) -> dict[str, float | int | str]:
    keys = jax.random.split(jax.random.key(SEED.value), rows)
    logits = 3 * jax.random.normal(jax.random.key(SEED.value), (rows, vocab))
    seeded = [params.with_seed(SEED.value + row) for row in range(rows)]
    batch = jax.device_put(SamplingBatch.from_params(seeded, rows))
    generated = jnp.zeros(rows, jnp.int32)
    ours, usual, logprobs = _medians_ms(
        lambda: sample(logits, batch, generated),
        lambda: _by_sorting(logits, keys, params),
        lambda: sample(logits, batch, generated, num_top_logprobs=20),
    )
    times = {"time_ms": ours, "usual_ms": usual, "ratio": usual / ours, "time_with_logprobs_ms": logprobs}
    return {"case": name, "rows": rows, "vocab": vocab} | times


def main() -> None:
    out, meta = start_result()
    shapes = [(rows, vocab) for rows in _ROWS.value for vocab in _VOCAB.value]
    results = [_measure(*shape, name, params) for shape in shapes for name, params in _CASES.items()]
    print_table(results, title="One sampling step")
    write_result(out, meta, results)


if __name__ == "__main__":
    run(main)
