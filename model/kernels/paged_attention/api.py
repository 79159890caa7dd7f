"""Paged attention and the KV write, over whichever backend fits the device."""

import dataclasses
import types
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.kernels import target
from model.kernels.paged_attention import cpu_ffi, cpu_library, mosaic_gpu, pallas_tpu, reference, tuning, xla
from model.kernels.paged_attention.problem import (
    KVPool,
    NewKV,
    Pools,
    Problem,
    Ragged,
    TileSizes,
    pools_of,
    problem_of,
    tokens_of_a_row,
)

_BACKENDS: dict[str, types.ModuleType] = {
    "cpu_ffi": cpu_ffi,
    "mosaic_gpu": mosaic_gpu,
    "pallas_tpu": pallas_tpu,
    "xla": xla,
    "reference": reference,
}
IMPLEMENTATIONS = tuple(_BACKENDS)


class _Choice(NamedTuple):
    """The backend for a platform, or for any if that is None, and the problem with the tile sizes that it shall use."""

    platform: str | None
    backend: str
    problem: Problem


_Choices = tuple[_Choice, ...]


def paged_attention(
    q: jax.Array,
    cache: KVPool,
    page_table: jax.Array,
    lengths: jax.Array,
    query_starts: jax.Array,
    *,
    max_query_len: int,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
    tile_sizes: TileSizes | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Causal attention of a ragged batch of queries over paged KV.

    A batch mixes decode rows (one query) and prefill chunks (many) freely. The queries of a row are the last tokens of
    its KV, so query i of n attends to the row's first `lengths - n + i + 1` tokens. Works inside jit with traced
    tables, and inside `shard_map` with heads sharded. PagedAttention: Kwon et al. 2023, arXiv:2309.06180, section 4.

    Args:
      q: `[tokens, q_heads, head_dim]`, the queries of all rows, row after row. Tokens from `query_starts[-1]` on are
        padding: finite values come out.
      cache: its `k` and `v` are `[pages, kv_heads, page_size, head_dim]`, or better the `pool_shape` of that; one-byte
        pools have `k_scale` and `v_scale`, float32 `[pages, kv_heads, page_size]`, or better `scales_shape` of that.
      page_table: int32 `[rows, max_pages]`. Entries past a row's length are never used.
      lengths: int32 `[rows]`, KV tokens of each row, its queries included. 0 marks an empty row.
      query_starts: int32 `[rows + 1]`, not decreasing: row r owns `q[query_starts[r]:query_starts[r + 1]]`.
      max_query_len: a bound on the queries of any row; 1 says that all rows decode.
      scale: multiplies the scores; None for `head_dim ** -0.5`.
      sliding_window: a query attends to this many tokens at most, itself included.
      soft_cap: scores become `soft_cap * tanh(scores / soft_cap)`.
      implementation: one of `IMPLEMENTATIONS`, or None for the fastest that takes this case on this platform.
      tile_sizes: how the kernel cuts its work; None for what was measured on this kind of device, else its heuristics.
      return_lse: also return the log-sum-exp of the scores, by which partial results merge.

    Returns:
      out `[tokens, q_heads, head_dim]` in q's dtype; with `return_lse` a pair with lse float32 `[tokens, q_heads]`,
      -inf where a query saw no key (its out is 0).

    Raises:
      ValueError: arguments that do not fit each other.
      NotImplementedError: the named implementation does not take this case; says what each one has against it.
    """
    pools, ragged = pools_of(cache), Ragged(page_table, lengths, query_starts)
    problem = problem_of(
        q,
        pools,
        ragged,
        max_query_len=max_query_len,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    out, lse = _attend(_choices(problem, implementation, tile_sizes), q, pools, ragged)
    return (out, lse) if return_lse else out


def write_and_attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    cache: KVPool,
    page_table: jax.Array,
    lengths: jax.Array,
    query_starts: jax.Array,
    *,
    max_query_len: int,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step of a layer: `write_kv` of its tokens, then `paged_attention` of their queries; one kernel on TPU.

    A page that is written must be in the table of one row only. Of such a page, slots past the row's end may change.

    Args:
      q: as in `paged_attention`, and so are the arguments from `cache` on.
      k: `[tokens, kv_heads, head_dim]`, the keys of q's tokens; cast to the pool's dtype.
      v: like `k`.
      slots: as in `write_kv`, of all tokens: where `page_table` puts each row's last tokens, and negative for padding.
        The kernels for TPU go by the table.

    Returns:
      (out `[tokens, q_heads, head_dim]` in q's dtype, K pool, V pool); the pools are written in place where donated.

    Raises:
      ValueError: arguments that do not fit each other, or one-byte pools, whose scales this does not make.
      NotImplementedError: as `paged_attention`.
    """
    pools, ragged = pools_of(cache), Ragged(page_table, lengths, query_starts)
    problem = problem_of(
        q,
        pools,
        ragged,
        max_query_len=max_query_len,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
    if problem.quantized:
        raise ValueError(f"`cache` holds {problem.kv_dtype}; only pools of unscaled values can be written here.")
    new = _new_kv(pools.k, pools.v, k, v, slots, problem.head_dim)

    out, written = _write_and_attend(_choices(problem, implementation), q, new, slots, pools, ragged)
    return out, written.k, written.v


def write_kv(
    cache_k: jax.Array, cache_v: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes keys and values of new tokens into the pools; in place where the pools are donated.

    Args:
      cache_k: `[pages, kv_heads, page_size, head_dim]`, or the `pool_shape` of that.
      cache_v: like `cache_k`.
      k: `[tokens, kv_heads, head_dim]`; cast to the pool's dtype.
      v: like `k`.
      slots: int32 `[tokens]`, `page * page_size + offset`, all different. Negative ones are padding and are dropped.

    Returns:
      The two pools.
    """
    lanes = cache_k.shape[3]
    head_dim = k.shape[-1] if tokens_of_a_row(k.shape[-1], lanes) else lanes
    return _write(cache_k, cache_v, _new_kv(cache_k, cache_v, k, v, slots, head_dim), slots)


def _new_kv(
    cache_k: jax.Array, cache_v: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, head_dim: int
) -> NewKV:
    """`k` and `v` in the pools' dtypes, checked to fit pools and slots."""
    for name, x, pool in (("k", k, cache_k), ("v", v, cache_v)):
        expected = [slots.shape[0], pool.shape[1], head_dim]
        if [*x.shape] != expected:
            raise ValueError(f"`{name}` is {list(x.shape)}; for these slots and pools it must be {expected}.")
    return NewKV(k.astype(cache_k.dtype), v.astype(cache_v.dtype))


def _write(cache_k: jax.Array, cache_v: jax.Array, new: NewKV, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    on_cpu = cpu_ffi.write_kv if cpu_library.unavailable() is None else _scatter
    return target.by_platform(cache_k, cache_v, *new, slots, cpu=on_cpu, default=_scatter)


def _scatter(
    cache_k: jax.Array, cache_v: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Row-flattened scatter: of XLA's spellings, the one that copies the pool on no accelerator inside a layer loop."""
    pages, kv_heads, head_dim = *cache_k.shape[:2], k.shape[2]
    page_size = cache_k.shape[2] * cache_k.shape[3] // head_dim
    page, offset = slots // page_size, slots % page_size
    rows = (page[:, None] * kv_heads + jnp.arange(kv_heads)[None, :]) * page_size + offset[:, None]
    rows = jnp.where(slots[:, None] < 0, pages * kv_heads * page_size, rows).reshape(-1)

    def write(pool, x):
        return pool.reshape(-1, head_dim).at[rows].set(x.reshape(-1, head_dim), mode="drop").reshape(pool.shape)

    return write(cache_k, k), write(cache_v, v)


# The layers of a model make the same call: jitted, it is traced and its kernel compiled for the first of them only.
@partial(jax.jit, static_argnums=0)
def _attend(choices: _Choices, q: jax.Array, pools: Pools, ragged: Ragged):
    def run(choice: _Choice):
        return partial(_BACKENDS[choice.backend].attend, choice.problem)

    return _by_choice(choices, run, q, pools, ragged)


@partial(jax.jit, static_argnums=0)
def _write_and_attend(
    choices: _Choices, q: jax.Array, new: NewKV, slots: jax.Array, pools: Pools, ragged: Ragged
) -> tuple[jax.Array, Pools]:
    def run(choice: _Choice):
        problem = choice.problem

        def fused(q, new, slots, pools, ragged):
            del slots
            out, _, written = pallas_tpu.write_and_attend(problem, q, new, pools, ragged)
            return out, written

        def write_first(q, new, slots, pools, ragged):
            written = Pools(*_write(pools.k, pools.v, new, slots))
            out, _ = _BACKENDS[choice.backend].attend(problem, q, written, ragged)
            return out, written

        return fused if choice.backend == "pallas_tpu" else write_first

    return _by_choice(choices, run, q, new, slots, pools, ragged)


def _by_choice(choices: _Choices, run: Callable[[_Choice], Callable], *operands):
    """What `run` makes of the choice for the platform that the call is compiled for."""
    if choices[0].platform is None:
        return run(choices[0])(*operands)
    return target.by_platform(*operands, **{str(choice.platform): run(choice) for choice in choices})


def _choices(problem: Problem, implementation: str | None, tile_sizes: TileSizes | None = None) -> _Choices:
    """The named implementation, or the fastest of each platform, with the given tile sizes, or the measured ones."""

    def choice(platform: str | None, name: str) -> _Choice:
        cut = tuning.tile_sizes_for(name, problem, target.device_kind()) if tile_sizes is None else tile_sizes
        return _Choice(platform, name, dataclasses.replace(problem, tile_sizes=cut))

    if implementation is None:
        return tuple(choice(platform, name) for platform, name in _fastest(problem).items())
    _check(implementation, problem)
    return (choice(None, implementation),)


def _fastest(problem: Problem) -> dict[str, str]:
    """By platform, the backend that is fastest for a case that nobody chose one for."""
    # XLA for TPU lays out pools of half a tile's lanes unlike what a kernel takes: they would be copied each time.
    on_tpu = pallas_tpu.unsupported(problem) is None and problem.head_dim * problem.row_tokens % 128 == 0
    return {
        "cpu": "xla" if cpu_ffi.unsupported(problem) else "cpu_ffi",
        "cuda": "xla" if mosaic_gpu.unsupported(problem) else "mosaic_gpu",
        "tpu": "pallas_tpu" if on_tpu else "xla",
        "default": "xla",
    }


def _check(implementation: str, problem: Problem) -> None:
    """Refuses an implementation that is unknown, or that does not take this case."""
    if implementation not in _BACKENDS:
        raise ValueError(f"`implementation` is {implementation!r}; it must be one of {IMPLEMENTATIONS} or None.")
    if _BACKENDS[implementation].unsupported(problem) is not None:
        reasons = {name: backend.unsupported(problem) or "takes it" for name, backend in _BACKENDS.items()}
        lines = "".join(f"\n  {name}: {reason}" for name, reason in reasons.items())
        raise NotImplementedError(f"`implementation={implementation!r}` does not take this case:{lines}")
