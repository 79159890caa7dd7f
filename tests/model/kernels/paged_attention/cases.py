"""Ragged batches over a shuffled page pool whose unused slots are poisoned, and the tolerance each dtype earns."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model.kernels.paged_attention.problem import Problem


class Cache(NamedTuple):
    """The least a KV pool can be."""

    k: jax.Array
    v: jax.Array


class QuantizedCache(NamedTuple):
    """A pool of one-byte values with a scale per token and head."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a batch."""

    q_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    max_pages: int = 6
    padding: int = 3
    dtype: str = "float32"


class Batch(NamedTuple):
    """The array arguments of `paged_attention`."""

    q: jax.Array
    cache: Cache
    page_table: jax.Array
    lengths: jax.Array
    query_starts: jax.Array


def build(shape: Shape, lengths: list[int], queries: list[int], seed: int = 0) -> Batch:
    """A batch whose pool has NaN in every slot that no row owns; table entries past a row's length are out of range."""
    rng = np.random.default_rng(seed)
    rows, size = len(lengths), shape.page_size
    used = [-(-length // size) for length in lengths]
    pages = sum(used) + 3
    order = rng.permutation(pages)
    table = np.full((rows, shape.max_pages), 2**30, np.int32)
    pool = np.full((2, pages, shape.kv_heads, size, shape.head_dim), np.nan, np.float32)
    taken = 0
    for row, length in enumerate(lengths):
        mine = order[taken : taken + used[row]]
        taken += used[row]
        table[row, : len(mine)] = mine
        for index, page in enumerate(mine):
            filled = min(size, length - index * size)
            pool[:, page, :, :filled] = rng.standard_normal((2, shape.kv_heads, filled, shape.head_dim))
    starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)
    q = 2 * rng.standard_normal((starts[-1] + shape.padding, shape.q_heads, shape.head_dim))
    k, v = (jnp.asarray(one, shape.dtype) for one in pool)
    return Batch(
        jnp.asarray(q, shape.dtype),
        Cache(k, v),
        jnp.asarray(table),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(starts),
    )


def build_integers(shape: Shape, lengths: list[int], queries: list[int]) -> Batch:
    """A batch of small integers, exact in every dtype, that shows a missing key far above its rounding.

    Scores are between -2 and 2. The value of a row's key j is positive in channel j modulo head_dim and zero in the
    others, so a key that is dropped, doubled or taken from another page or head changes a channel by much.
    """
    batch = build(shape, lengths, queries)
    q = np.random.default_rng(1).integers(0, 3, batch.q.shape) * shape.head_dim**0.5
    k, v = (np.asarray(pool.astype(jnp.float32)).copy() for pool in batch.cache)
    heads = np.arange(shape.kv_heads)
    for row, length in enumerate(lengths):
        for position in range(length):
            page = batch.page_table[row, position // shape.page_size]
            slot, channel = position % shape.page_size, position % shape.head_dim
            k[page, :, slot] = v[page, :, slot] = 0
            k[page, :, slot, channel] = (-1) ** position
            v[page, :, slot, channel] = 1 + heads + 2 * (row % 4)
    k, v = (jnp.asarray(pool, shape.dtype) for pool in (k, v))
    return batch._replace(q=jnp.asarray(q, shape.dtype), cache=Cache(k, v))


def quantize(cache: Cache, dtype: str) -> QuantizedCache:
    """The cache in one-byte values, scaled per token and head to the dtype's range; poisoned slots get NaN scales."""
    top = 127.0 if dtype == "int8" else float(jnp.finfo(dtype).max)
    values, scales = [], []
    for pool in cache:
        scale = jnp.max(jnp.abs(pool.astype(jnp.float32)), axis=-1) / top
        scaled = jnp.nan_to_num(pool.astype(jnp.float32) / scale[..., None])
        values.append((jnp.round(scaled) if dtype == "int8" else scaled).astype(dtype))
        scales.append(scale)
    return QuantizedCache(*values, *scales)


def dequantize(cache: QuantizedCache) -> Cache:
    """The float32 values that a quantized cache stands for."""
    k, v = cache.k.astype(jnp.float32), cache.v.astype(jnp.float32)
    return Cache(k * cache.k_scale[..., None], v * cache.v_scale[..., None])


def problem(**changes: object) -> Problem:
    """A decode step of 32 rows over bfloat16 KV, with these changes."""
    sizes = {"tokens": 32, "rows": 32, "pages": 4096, "max_pages": 64, "q_heads": 64, "kv_heads": 8, "head_dim": 128}
    dtypes = {"q_dtype": jnp.dtype("bfloat16"), "kv_dtype": jnp.dtype("bfloat16")}
    options = {"page_size": 64, "max_query_len": 1, "scale": 0.1, "sliding_window": None, "soft_cap": None}
    return Problem(**(sizes | dtypes | options | changes))


def tolerance(dtype: str) -> float:
    """Largest difference from the float32 reference on values of order 1.

    float32: sums of up to 100 products in another order, 1e-5. 16-bit: the result is rounded to its dtype once
    (half an ulp of numbers below 4) and backends may round the softmax weights to it before the second product.
    """
    return {"float32": 1e-5, "bfloat16": 2.0**-6, "float16": 2.0**-9}[dtype]


def integer_tolerance(dtype: str) -> float:
    """Largest relative difference on a batch of `build_integers`: that of a float32 sum, or of two roundings.

    No sum cancels. Of 16-bit results, the weights may be rounded, and the result is.
    """
    return {"float32": 1e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}[dtype]


def dense_attention(
    batch: Batch, *, scale=None, sliding_window=None, soft_cap=None, dropped: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Independent reference in float64 numpy, one token and head at a time: (out, lse).

    With `dropped`, the key at that position of every row is left out, as by a faulty kernel.
    """
    q = np.asarray(batch.q.astype(jnp.float32), np.float64)
    k_pool, v_pool = (np.asarray(pool.astype(jnp.float32), np.float64) for pool in batch.cache)
    table, lengths, starts = (np.asarray(x) for x in batch[2:])
    tokens, q_heads, head_dim = q.shape
    group = q_heads // k_pool.shape[1]
    out, lse = np.zeros(q.shape), np.full((tokens, q_heads), -np.inf)
    for row, length in enumerate(lengths):
        pages = table[row, : -(-length // k_pool.shape[2])]
        k, v = (np.concatenate([pool[p] for p in pages] or [pool[0]], axis=1) for pool in (k_pool, v_pool))
        for token in range(starts[row], starts[row + 1]):
            last = length - starts[row + 1] + token
            first = 0 if sliding_window is None else max(0, last - sliding_window + 1)
            if last < 0:
                continue
            for head in range(q_heads):
                seen = np.array([j for j in range(first, last + 1) if j != dropped], np.int32)
                if not seen.size:
                    continue
                keys = k[head // group, seen]
                scores = keys @ q[token, head] * (head_dim**-0.5 if scale is None else scale)
                if soft_cap is not None:
                    scores = soft_cap * np.tanh(scores / soft_cap)
                lse[token, head] = np.log(np.sum(np.exp(scores)))
                out[token, head] = np.exp(scores - lse[token, head]) @ v[head // group, seen]
    return out, lse
