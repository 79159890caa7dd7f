"""A decode step of a model whose attention, KV included, is on one device and whose products are on another."""

import dataclasses
import functools
import statistics
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from model.config import ModelConfig
from model.kernels.linear import linear
from model.kernels.paged_attention import write_and_attend

_PAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class Pair:
    """`dense` does the products, `attention` holds the KV; the same device twice is a model in one place."""

    dense: jax.Device
    attention: jax.Device


class _KV(NamedTuple):
    k: jax.Array
    v: jax.Array


class _Weights(NamedTuple):
    """Of one layer, `[columns, size]` each."""

    qkv: jax.Array
    o: jax.Array
    gate_up: jax.Array
    down: jax.Array


def measure(config: ModelConfig, layers: int, batch: int, context: int, pair: Pair, repeats: int) -> dict[str, Any]:
    """Median seconds of one step, and the bytes that cross per step; weights and KV are of the config's shape.

    Norms and rotations are left out: they move next to no bytes. Layers follow each other, and so do both devices.
    """
    rng = np.random.default_rng(0)
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    pages = -(-context // _PAGE_SIZE)
    shapes = (
        ((heads + 2 * kv_heads) * head_dim, config.hidden_size),
        (config.hidden_size, heads * head_dim),
        (2 * config.intermediate_size, config.hidden_size),
        (config.hidden_size, config.intermediate_size),
    )

    @functools.partial(jax.jit, static_argnums=0, out_shardings=jax.sharding.SingleDeviceSharding(pair.dense))
    def weight(shape, seed):
        return 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)

    weights = [_Weights(*(weight(s, 4 * layer + i) for i, s in enumerate(shapes))) for layer in range(layers)]
    pool = np.zeros((batch * pages, kv_heads, _PAGE_SIZE, head_dim), jnp.bfloat16)
    caches = [_KV(*jax.device_put((pool, pool), pair.attention)) for _ in range(layers)]
    table = rng.permutation(batch * pages).reshape(batch, pages).astype(np.int32)
    slots = table[:, (context - 1) // _PAGE_SIZE] * _PAGE_SIZE + (context - 1) % _PAGE_SIZE
    ragged = (table, np.full(batch, context, np.int32), np.arange(batch + 1, dtype=np.int32))
    slots, *ragged = jax.device_put((slots, *ragged), pair.attention)

    @jax.jit
    def project(x, w: _Weights):
        q, k, v = jnp.split(linear(x, w.qkv).astype(x.dtype), (heads * head_dim, (heads + kv_heads) * head_dim), 1)
        return q.reshape(batch, heads, head_dim), *(y.reshape(batch, kv_heads, head_dim) for y in (k, v))

    @functools.partial(jax.jit, donate_argnums=3)
    def attend(q, k, v, cache: _KV, slots, *ragged):
        out, *pools = write_and_attend(q, k, v, slots, cache, *ragged, max_query_len=1)
        return out.reshape(batch, -1), _KV(*pools)

    @jax.jit
    def finish(x, out, w: _Weights):
        x = x + linear(out, w.o).astype(x.dtype)
        gate, up = jnp.split(linear(x, w.gate_up).astype(x.dtype), 2, 1)
        return x + linear(jax.nn.silu(gate) * up, w.down).astype(x.dtype)

    def step(x):
        for layer, w in enumerate(weights):
            new = jax.device_put(project(x, w), pair.attention)
            out, caches[layer] = attend(*new, caches[layer], slots, *ragged)
            x = finish(x, jax.device_put(out, pair.dense), w)
        return jax.block_until_ready(x)

    x = jax.device_put(rng.standard_normal((batch, config.hidden_size)).astype(jnp.bfloat16), pair.dense)
    times = []
    for _ in tqdm(range(repeats + 1), desc=f"attention on {pair.attention.platform}", leave=False):
        start = time.perf_counter()
        step(x)
        times.append(time.perf_counter() - start)
    step_s = statistics.median(times[1:])
    crossing = 0 if pair.dense == pair.attention else 2 * layers * batch * head_dim * (2 * heads + 2 * kv_heads)
    return {
        "dense": pair.dense.device_kind,
        "attention": pair.attention.device_kind,
        "layers": layers,
        "batch": batch,
        "context": context,
        "step_s": step_s,
        "tok_s": batch / step_s,
        "crossing_bytes": crossing,
    }
