"""Paged attention on Hopper GPUs, in Pallas for Mosaic GPU: TMA gathers pages, wgmma multiplies them.

Rows of one query go through the decode kernel and longer ones through the prefill kernel. XLA gathers the queries of
each tile, whatever their place in the batch, and puts the results back.
"""

import jax
import jax.numpy as jnp

from model.kernels import target
from model.kernels.paged_attention.mosaic_gpu import decode, device, prefill
from model.kernels.paged_attention.mosaic_gpu.tiles import LEAST_SCALE, TILE, Tile
from model.kernels.paged_attention.problem import Pools, Problem, Ragged, plain

_DTYPES = ("bfloat16", "float16")
_KV_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
_HEAD_DIMS = (64, 128, 256)
_PAGE_SIZES = (16, 32, 64, 128)
# Shared memory of a Hopper multiprocessor and what each thread block may have of it, in bytes; 1 KiB is the driver's.
_SHARED_PER_CORE, _SHARED_PER_BLOCK, _SHARED_RESERVED = 233472, 232448, 1024
_BARRIER_BYTES = 256
_MOST_SPLITS, _LEAST_BLOCKS_PER_SPLIT = 32, 4


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot take the case, or None."""
    if problem.q_dtype.name not in _DTYPES:
        return f"q is {problem.q_dtype}; it must be one of {_DTYPES}."
    if problem.kv_dtype != problem.q_dtype and problem.kv_dtype.name not in _KV_DTYPES:
        return f"the pools are {problem.kv_dtype}; they must have q's dtype, {problem.q_dtype}, or be of {_KV_DTYPES}."
    if problem.head_dim not in _HEAD_DIMS:
        return f"head_dim is {problem.head_dim}; it must be one of {_HEAD_DIMS}."
    if problem.quantized and problem.head_dim > 128:
        return f"head_dim is {problem.head_dim}; with scales it must be 128 at most, or the registers spill."
    if problem.quantized and problem.page_size < 32:
        return f"page_size is {problem.page_size}; with scales it must be 32 at least, or TMA cannot place them."
    if problem.scale < LEAST_SCALE:
        return f"scale is {problem.scale}; it must be {LEAST_SCALE} at least."
    if problem.page_size not in _PAGE_SIZES:
        return f"page_size is {problem.page_size}; it must be one of {_PAGE_SIZES}."
    if problem.group > TILE:
        return f"{problem.group} query heads share a KV head; at most {TILE} may."
    if problem.pages * problem.kv_heads * problem.page_size >= 2**31:
        return f"{problem.pages} pages hold more than 2^31 rows."
    platform = target.platform()
    if platform == "gpu":
        capability = device.compute_capability()
        if capability is None or not capability.startswith("9."):
            return f"the GPU has compute capability {capability}; it must be 9.x (Hopper)."
    elif platform != "cpu":
        return f"the platform is {platform}; it must be a Hopper GPU, or a CPU to interpret the kernels."
    return None


def attend(problem: Problem, q: jax.Array, pools: Pools, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
    """Returns (out `[tokens, q_heads, head_dim]` in q's dtype, lse float32 `[tokens, q_heads]`).

    On CPU the kernels are interpreted, with race detection: right and very slow.
    """
    pools = plain(problem, pools)
    out, lse = decode.attend(tile_of(problem, decode_keys(problem)), decode_launch(problem), q, pools, ragged)
    if problem.max_query_len == 1:
        return out, lse
    token = jnp.arange(problem.tokens, dtype=jnp.int32)
    # Not the default method, whose loop takes a launch per step.
    row = jnp.searchsorted(ragged.query_starts, token, side="right", method="compare_all").astype(jnp.int32) - 1
    owned = (row >= 0) & (row < problem.rows)
    row = jnp.clip(row, 0, problem.rows - 1)
    chunk_out, chunk_lse = _attend_chunks(problem, q, pools, ragged, row, token)
    chunked = jnp.diff(ragged.query_starts)[row] > 1
    out = jnp.where(chunked[:, None, None], chunk_out, out[row])
    lse = jnp.where(chunked[:, None], chunk_lse, lse[row])
    return jnp.where(owned[:, None, None], out, 0), jnp.where(owned[:, None], lse, -jnp.inf)


def tile_of(problem: Problem, keys: int) -> Tile:
    """What of a problem a kernel needs to know that takes so many keys in one step."""
    return Tile(
        keys=keys,
        kv_heads=problem.kv_heads,
        group=problem.group,
        head_dim=problem.head_dim,
        page_size=problem.page_size,
        dtype=problem.q_dtype,
        kv_dtype=problem.kv_dtype,
        scale=problem.scale,
        sliding_window=problem.sliding_window,
        soft_cap=problem.soft_cap,
        interpret=target.platform() == "cpu",
    )


def decode_keys(problem: Problem) -> int:
    """Keys of one step of a decode; fewer where the sums of a tile alone take half of the registers of its threads."""
    return TILE if problem.head_dim <= 128 else TILE // 2


def prefill_keys(problem: Problem) -> int:
    """Keys of one step of a prefill, likewise: a soft cap's arithmetic and widened values take registers too."""
    plain = problem.head_dim <= 128 and problem.soft_cap is None and not problem.quantized
    return 2 * TILE if plain else decode_keys(problem)


def _attend_chunks(problem: Problem, q, pools: Pools, ragged: Ragged, row: jax.Array, token: jax.Array):
    """(out, lse) of every token; anything for tokens of rows that have one query."""
    tile = tile_of(problem, prefill_keys(problem))
    size = prefill.tile_tokens(tile)
    starts, counts = ragged.query_starts[:-1], jnp.diff(ragged.query_starts)
    # TMA reads queries from a multiple of 8 on, so a row's first tile may begin with tokens of others.
    lead = starts % prefill.ALIGNMENT
    tiles = jnp.where(counts > 1, (lead + counts + size - 1) // size, 0)
    ends = jnp.cumsum(tiles)
    # Every row could have a last tile that is not full, but for its two tokens at least.
    rows = min(problem.rows, problem.tokens // 2)
    most = (problem.tokens + (prefill.ALIGNMENT - 1) * (rows - 1) - rows) // size + rows
    number = jnp.arange(most, dtype=jnp.int32)
    tile_row = jnp.searchsorted(ends, number, side="right", method="compare_all").astype(jnp.int32)
    tile_row = jnp.minimum(tile_row, problem.rows - 1)
    offset = (number - ends[tile_row] + tiles[tile_row]) * size - lead[tile_row]
    position = ragged.lengths[tile_row] - counts[tile_row] + offset
    queries = jnp.minimum(counts[tile_row] - offset, size)
    used = number < ends[-1]
    chunks = prefill.Chunks(
        row=tile_row,
        token=jnp.where(used, starts[tile_row] + offset, 0),
        position=jnp.where(used, position, 0),
        last=jnp.where(used, position + queries - 1, -1),
    )
    outs, lses = prefill.attend(tile, prefill_stages(problem), q, pools, ragged.page_table, chunks)
    place = token - starts[row] + lead[row]
    where = (jnp.maximum(ends[row] - tiles[row], 0) + place // size, slice(None), place % size)
    return outs.at[where].get(mode="clip"), lses.at[where].get(mode="clip")


def decode_launch(problem: Problem) -> decode.LaunchConfig:
    """As many key blocks in flight as let two thread blocks share a multiprocessor, and splits that fill the device."""
    tile = tile_of(problem, decode_keys(problem))
    taken = _SHARED_RESERVED + _BARRIER_BYTES + TILE * problem.head_dim * 2 + tile.wide_bytes
    stages = (_SHARED_PER_CORE // 2 - taken) // (2 * tile.block_bytes)
    by_token = problem.max_query_len == 1
    if problem.tile_sizes.splits is not None:
        return decode.LaunchConfig(problem.tile_sizes.splits, stages, by_token)
    slots = device.cores() * 2
    work = problem.rows * problem.kv_heads
    blocks = -(-problem.max_pages * problem.page_size // tile.keys)
    most = max(1, min(_MOST_SPLITS, blocks // _LEAST_BLOCKS_PER_SPLIT))

    def busy(splits: int) -> float:
        waves = work * splits / slots
        return waves / -(-work * splits // slots)

    enough = (splits for splits in range(1, most + 1) if busy(splits) >= 0.9)
    return decode.LaunchConfig(next(enough, max(range(1, most + 1), key=busy)), stages, by_token)


def prefill_stages(problem: Problem) -> int:
    """Key blocks in flight beside the two query tiles, of four at most."""
    tile = tile_of(problem, prefill_keys(problem))
    taken = _BARRIER_BYTES + 2 * (TILE * problem.head_dim * 2 + tile.wide_bytes)
    return min(4, (_SHARED_PER_BLOCK - taken) // (2 * tile.block_bytes))
