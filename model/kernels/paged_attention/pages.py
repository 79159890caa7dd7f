"""Whole pages out of the pools and into them."""

from functools import partial

import jax
import jax.numpy as jnp

from model.kernels import target
from model.kernels.paged_attention import cpu_ffi, cpu_library


def read_pages(cache_k: jax.Array, cache_v: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gathers pages of both pools.

    Args:
      cache_k: `[pages, kv_heads, page_size, head_dim]`, or the `pool_shape` of that.
      cache_v: like `cache_k`.
      pages: int32 `[n]`, each a page of the pools.

    Returns:
      K and V `[n, *cache_k.shape[1:]]`.
    """
    return cache_k.at[pages].get(mode="clip"), cache_v.at[pages].get(mode="clip")


def write_pages(
    cache_k: jax.Array, cache_v: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes whole pages into the pools; in place where the pools are donated.

    Args:
      cache_k: `[pages, kv_heads, page_size, head_dim]`, or the `pool_shape` of that.
      cache_v: like `cache_k`.
      k: `[n, *cache_k.shape[1:]]` of the pool's dtype.
      v: like `k`.
      pages: int32 `[n]`, all different. Negative ones are padding and are dropped.

    Returns:
      The two pools.
    """
    on_cpu = _copy_rows if cpu_library.unavailable() is None else _scatter
    return target.by_platform(cache_k, cache_v, k, v, pages, cpu=on_cpu, default=_scatter)


def _copy_rows(cache_k: jax.Array, cache_v: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array):
    # A page of one head as one token, which is as long as the page: XLA:CPU of jax 0.10 would copy a bfloat16 pool.
    as_tokens = partial(jnp.reshape, shape=(*k.shape[:2], -1))
    return cpu_ffi.write_kv(cache_k, cache_v, as_tokens(k), as_tokens(v), pages)


def _scatter(cache_k: jax.Array, cache_v: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array):
    where = jnp.where(pages < 0, cache_k.shape[0], pages)
    return cache_k.at[where].set(k, mode="drop"), cache_v.at[where].set(v, mode="drop")
