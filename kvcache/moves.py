"""Whole pages between a pool and host memory: one gather out, one write in, and the pool is never copied.

Calls only dispatch. Both read or replace the pool, which every step donates, so they belong on the thread that runs the
steps; waiting for a block and copying its bytes may happen on any thread.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from kvcache.errors import KVCacheError
from kvcache.kv_block import KVBlock
from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache
from model.kernels.paged_attention import read_pages, write_pages

_POOL = PartitionSpec(None, "tp")
_BLOCK = PartitionSpec(None, None, "tp")


def extract(cache: PagedKVCache, pages: Sequence[int], layers: range) -> KVBlock:
    """Gathers `pages` of `layers` into a block of its own and starts to copy the block off the device.

    Later steps do not change the block. Compiles once for each power of two of pages and number of layers.

    Raises:
        KVCacheError: no pages, or pages or layers that the cache does not have.
    """
    _check(cache.layout, pages, layers)
    size = _next_power(len(pages))
    padded = [*pages, *[pages[0]] * (size - len(pages))]
    k, v = gather(cache.k.sharding)(cache, _rows(cache.layout, padded, layers))
    k.copy_to_host_async()
    v.copy_to_host_async()
    return KVBlock(k=k, v=v, num_pages=len(pages), layers=layers)


def insert(cache: PagedKVCache, pages: Sequence[int], block: KVBlock) -> tuple[PagedKVCache, Array]:
    """Writes `block` into `pages`; the cache is donated.

    A NumPy block is not copied before this returns: its memory must stay as it is until `done.is_ready()`. (Overwritten
    earlier, it ends up in the pool in whatever state the step before it leaves time for.) Hand over device blocks only
    once they are ready: the next step would wait for them. A NumPy block of a number of pages that is no power of two
    is written in several calls, one for each power of two in it, so that nothing new is compiled.

    Returns:
        The cache with the block, and `done`, an int32 array that is ready once the block has been read.

    Raises:
        KVCacheError: a block that does not fit `pages` or the cache.
    """
    _check(cache.layout, pages, block.layers)
    expected = (len(block.layers), *cache.k.shape[1:])
    if len(pages) != block.num_pages or block.k.shape[1:] != expected or block.k.dtype != cache.k.dtype:
        raise KVCacheError(
            f"a block of {block.num_pages} pages, {block.k.dtype}{[*block.k.shape[1:]]} each, does not fit "
            f"{len(pages)} pages of {cache.k.dtype}{[*expected]}; insert it into a pool of the layout it comes from."
        )
    rows = _rows(cache.layout, pages, block.layers)
    if block.k.shape[0] > len(pages):
        rows = np.pad(rows, ((0, block.k.shape[0] - len(pages)), (0, 0)), constant_values=-1)
    write = scatter(cache.k.sharding)
    if isinstance(block.k, Array):
        return write(cache, *jax.device_put((block.k, block.v), block_sharding(cache.k.sharding)), rows)
    first, *others = _powers_of_two(rows.shape[0])
    cache, done = write(cache, block.k[first], block.v[first], rows[first])
    for part in others:
        cache, done = write(cache, block.k[part], block.v[part], rows[part])
    return cache, done


def warm_up(cache: PagedKVCache, max_pages: int, num_layers: int) -> PagedKVCache:
    """Compiles all moves of up to `max_pages` pages in any `num_layers` layers. The cache is donated and unchanged."""
    layers, size = range(num_layers), 1
    while True:
        block = extract(cache, [0] * size, layers)
        nowhere = np.full((size, num_layers), -1, np.int32)
        empty = (np.zeros(block.k.shape, block.k.dtype) for _ in range(2))
        cache, _ = scatter(cache.k.sharding)(cache, block.k, block.v, nowhere)
        cache, done = scatter(cache.k.sharding)(cache, *empty, nowhere)
        jax.block_until_ready(done)
        if size >= max_pages:
            return cache
        size *= 2


@functools.lru_cache(maxsize=64)
def gather(pool: Sharding) -> jax.stages.Wrapped:
    """Returns the jitted gather of a pool so placed: (cache, rows int32 `[pages, layers]`) -> K and V of a block."""

    def read(cache: PagedKVCache, rows: Array) -> tuple[Array, Array]:
        k, v = read_pages(cache.k, cache.v, rows.reshape(-1))
        return k.reshape(*rows.shape, *k.shape[1:]), v.reshape(*rows.shape, *v.shape[1:])

    block = block_sharding(pool)
    return jax.jit(
        _over_heads(read, pool, (_POOL, PartitionSpec()), (_BLOCK, _BLOCK)),
        in_shardings=(pool, _whole(pool)),
        out_shardings=(block, block),
    )


@functools.lru_cache(maxsize=64)
def scatter(pool: Sharding) -> jax.stages.Wrapped:
    """Returns the jitted write: (cache, K, V, rows int32 `[pages, layers]`, -1 = dropped) -> cache and `done`."""

    def write(cache: PagedKVCache, k: Array, v: Array, rows: Array) -> tuple[PagedKVCache, Array]:
        page = cache.k.shape[1:]
        pools = write_pages(cache.k, cache.v, k.reshape(-1, *page), v.reshape(-1, *page), rows.reshape(-1))
        return PagedKVCache(*pools, cache.layout), jnp.sum(rows)

    block = block_sharding(pool)
    return jax.jit(
        _over_heads(write, pool, (_POOL, _BLOCK, _BLOCK, PartitionSpec()), (_POOL, PartitionSpec())),
        in_shardings=(pool, block, block, _whole(pool)),
        out_shardings=(pool, _whole(pool)),
        donate_argnums=0,
    )


def block_sharding(pool: Sharding) -> Sharding:
    """Returns how the K and V of a block are placed beside a pool that is placed so: split by KV head where it is."""
    return NamedSharding(pool.mesh, _BLOCK) if isinstance(pool, NamedSharding) else pool


def _whole(pool: Sharding) -> Sharding:
    return NamedSharding(pool.mesh, PartitionSpec()) if isinstance(pool, NamedSharding) else pool


def _over_heads(function: Callable, pool: Sharding, in_specs: tuple, out_specs: Any) -> Callable:
    """Maps `function` over the devices of `tp`, by KV head; a plain jit would return the pool replicated."""
    if not isinstance(pool, NamedSharding):
        return function
    return jax.shard_map(
        function,
        mesh=pool.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={"tp"},
        check_vma=False,  # as in model.sharding.shard_attend
    )


def _rows(layout: KVLayout, pages: Sequence[int], layers: range) -> np.ndarray:
    """Rows of the pools: int32 `[pages, layers]`."""
    first = np.asarray(layers, np.int32) * layout.num_pages
    return np.asarray(pages, np.int32)[:, None] + first


def _check(layout: KVLayout, pages: Sequence[int], layers: range) -> None:
    if not pages or min(pages) < 0 or max(pages) >= layout.num_pages:
        raise KVCacheError(f"`pages` is {[*pages]}; it must name pages from 0 to {layout.num_pages - 1}, at least one.")
    if not layers or min(layers) < 0 or max(layers) >= layout.num_layers:
        raise KVCacheError(
            f"`layers` is {layers}; it must name layers from 0 to {layout.num_layers - 1}, at least one."
        )


def _next_power(size: int) -> int:
    return 1 << (size - 1).bit_length()


def _powers_of_two(total: int) -> Iterator[slice]:
    """Yields consecutive parts of `total`, the largest first, the size of each a power of two."""
    start = 0
    while start < total:
        end = start + (1 << (total - start).bit_length() - 1)
        yield slice(start, end)
        start = end
