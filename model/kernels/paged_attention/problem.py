"""What a call of paged attention asks for: the arrays it takes and the static facts a backend decides by."""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from model.kernels.pool_shape import scales_shape


class KVPool(Protocol):
    """Anything that holds the two pools, such as a paged KV cache; one-byte pools also have `k_scale` and `v_scale`."""

    @property
    def k(self) -> jax.Array:
        """Keys `[pages, kv_heads, page_size, head_dim]`."""
        ...

    @property
    def v(self) -> jax.Array:
        """Values, shaped like the keys."""
        ...


class Pools(NamedTuple):
    """The pools as they are kept.

    `k` and `v` are `[pages, kv_heads, page_size, head_dim]`, or the `pool_shape` of that. `k_scale` and `v_scale` are
    float32 `[pages, kv_heads, page_size]`, one scale per token and head, where the pools are int8 or float8; else None.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


class NewKV(NamedTuple):
    """Keys and values of the tokens of `q`, `[tokens, kv_heads, head_dim]` in the pools' dtype, still to be written."""

    k: jax.Array
    v: jax.Array


class Ragged(NamedTuple):
    """Which tokens belong to which row, all int32.

    `page_table` `[rows, max_pages]` ids into the pools' first axis; `lengths` `[rows]` KV tokens of each row, the
    queries' own included, 0 for an empty row; `query_starts` `[rows + 1]`: row r owns
    `q[query_starts[r]:query_starts[r + 1]]`, which are the last tokens of its KV.
    """

    page_table: jax.Array
    lengths: jax.Array
    query_starts: jax.Array


@dataclasses.dataclass(frozen=True)
class TileSizes:
    """How a kernel cuts its work; None leaves a choice to its heuristic, and others than its own mean nothing to it.

    Attributes:
      decode_keys: keys of one step of a decode on TPU.
      prefill_keys: keys of one step of a prefill on TPU.
      prefill_queries: queries of one step of a prefill on TPU, a power of two of 16 or more.
      splits: thread blocks that share a row's KV in a decode on Hopper.
    """

    decode_keys: int | None = None
    prefill_keys: int | None = None
    prefill_queries: int | None = None
    splits: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The static side of one call: sizes, dtypes and options. Hashable, so kernels are cached by it."""

    tokens: int
    rows: int
    pages: int
    max_pages: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    q_dtype: jnp.dtype
    kv_dtype: jnp.dtype
    max_query_len: int
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    row_tokens: int = 1  # that share a row of 128 in the pools as they are kept, see `pool_shape`
    tile_sizes: TileSizes = TileSizes()

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.q_heads // self.kv_heads

    @property
    def quantized(self) -> bool:
        """Whether the pools hold scaled one-byte values."""
        return self.kv_dtype.itemsize == 1


def pools_of(cache: KVPool) -> Pools:
    """The arrays of a cache.

    Raises:
      ValueError: one-byte pools without scales, or pools whose shapes differ.
    """
    pools = Pools(cache.k, cache.v, getattr(cache, "k_scale", None), getattr(cache, "v_scale", None))
    if pools.k.ndim != 4 or pools.k.shape != pools.v.shape or pools.k.dtype != pools.v.dtype:
        raise ValueError(
            "`cache.k` and `cache.v` must be alike, [pages, kv_heads, page_size, head_dim]; they are "
            f"{pools.k.dtype}{list(pools.k.shape)} and {pools.v.dtype}{list(pools.v.shape)}."
        )
    one_byte = pools.k.dtype.itemsize == 1
    for name, scale in (("k_scale", pools.k_scale), ("v_scale", pools.v_scale)):
        if one_byte != (scale is not None):
            raise ValueError(
                f"`cache.{name}` is {'missing' if one_byte else 'given'}, but the pools are {pools.k.dtype}: one-byte "
                "pools need float32 scales [pages, kv_heads, page_size], wider ones take none."
            )
        shapes = (pools.k.shape[:3], scales_shape(*pools.k.shape[:3]))
        if scale is not None and scale.shape not in shapes:
            raise ValueError(f"`cache.{name}` is {list(scale.shape)}; it must be {' or '.join(map(str, shapes))}.")
    if pools.k_scale is None or pools.v_scale is None:
        return pools
    scales = (scale.reshape(pools.k.shape[:3]) for scale in (pools.k_scale, pools.v_scale))
    return Pools(pools.k, pools.v, *scales)


def tokens_of_a_row(head_dim: int, lanes: int) -> int:
    """How many tokens share the last axis of a pool of unscaled values, `lanes` long; 0 if heads do not fit it."""
    return 2 if (head_dim, lanes) == (64, 128) else int(head_dim == lanes)


def plain(problem: Problem, pools: Pools) -> Pools:
    """The pools with a row for each token: for XLA to gather from, not to carry from layer to layer, or it copies."""
    shape = (problem.pages, problem.kv_heads, problem.page_size, problem.head_dim)
    return pools._replace(k=pools.k.reshape(shape), v=pools.v.reshape(shape))


def problem_of(
    q: jax.Array,
    pools: Pools,
    ragged: Ragged,
    *,
    max_query_len: int,
    scale: float | None,
    sliding_window: int | None,
    soft_cap: float | None,
) -> Problem:
    """Checks that the arrays fit each other and returns the static side of the call.

    Raises:
      ValueError: a shape, dtype or option that no backend could ever take; it names the argument and its value.
    """
    pages, kv_heads, page_rows, lanes = pools.k.shape
    row_tokens = 0 if q.ndim != 3 else tokens_of_a_row(q.shape[2], lanes)
    if not row_tokens or (row_tokens > 1 and pools.k_scale is not None):
        raise ValueError(f"`q` is {list(q.shape)}; it must be [tokens, q_heads, {lanes}] to fit the pools.")
    tokens, q_heads, head_dim = q.shape
    page_size = page_rows * row_tokens
    if q_heads % kv_heads:
        raise ValueError(f"`q` has {q_heads} heads, which the {kv_heads} KV heads do not divide.")
    if ragged.page_table.ndim != 2:
        raise ValueError(f"`page_table` is {list(ragged.page_table.shape)}; it must be [rows, max_pages].")
    rows, max_pages = ragged.page_table.shape
    if ragged.lengths.shape != (rows,) or ragged.query_starts.shape != (rows + 1,):
        raise ValueError(
            f"`page_table` has {rows} rows, so `lengths` must be [{rows}] and `query_starts` [{rows + 1}]; they are "
            f"{list(ragged.lengths.shape)} and {list(ragged.query_starts.shape)}."
        )
    for name, array in ragged._asdict().items():
        if array.dtype != jnp.int32:
            raise ValueError(f"`{name}` is {array.dtype}; it must be int32.")
    if not max_query_len >= 1:
        raise ValueError(f"`max_query_len` is {max_query_len}; it must be at least 1.")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"`sliding_window` is {sliding_window}; it must be at least 1, or None for full attention.")
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"`soft_cap` is {soft_cap}; it must be positive, or None for no cap.")
    return Problem(
        tokens=tokens,
        rows=rows,
        pages=pages,
        max_pages=max_pages,
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        page_size=page_size,
        q_dtype=jnp.dtype(q.dtype),
        kv_dtype=jnp.dtype(pools.k.dtype),
        max_query_len=min(max_query_len, max(tokens, 1)),
        scale=head_dim**-0.5 if scale is None else float(scale),
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        row_tokens=row_tokens,
    )
