"""Prefill chunks on Hopper GPUs: two warpgroups multiply, one query head and 64 queries each, and a third loads KV.

The two take turns: while one multiplies, the other has the special functions of its softmax, as in FlashAttention-3
(arXiv:2407.08608, section 3.1). Both share every block of keys. Where the query heads of a KV head are even in number,
the two take two heads of the same 64 tokens, so that the diagonal wastes least; else they take 128 tokens of one head.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.kernels.paged_attention.mosaic_gpu import device, tiles
from model.kernels.paged_attention.mosaic_gpu.tiles import TILE, Tile
from model.kernels.paged_attention.problem import Pools

# Rows of a swizzle tile: TMA brings whole ones.
ALIGNMENT = 8
_CONSUMERS = 2


class Chunks(NamedTuple):
    """Which queries each tile holds, int32 `[tiles]`.

    `row` owns the tile; `token` is its first one, a multiple of `ALIGNMENT`, and `position` that token's in the row's
    KV, or what it would be if the row owned it; `last` is the position of its last query, -1 where it is not used.
    """

    row: jax.Array
    token: jax.Array
    position: jax.Array
    last: jax.Array


def tile_tokens(tile: Tile) -> int:
    """Tokens of a tile."""
    return TILE if tile.group % _CONSUMERS == 0 else TILE * _CONSUMERS


def attend(
    tile: Tile, stages: int, q: jax.Array, pools: Pools, page_table: jax.Array, chunks: Chunks
) -> tuple[jax.Array, jax.Array]:
    """Attends tiles of queries.

    Args:
      tile: static facts.
      stages: key blocks in flight in a thread block.
      q: `[tokens, q_heads, head_dim]`.
      pools: K and V.
      page_table: int32 `[rows, max_pages]`.
      chunks: what the tiles hold.

    Returns:
      (out `[tiles, q_heads, tile_tokens, head_dim]`, lse float32 `[tiles, q_heads, tile_tokens]`); anything where a
      tile holds no query of its row.
    """
    (_, q_heads, head_dim), count, tokens = q.shape, chunks.row.shape[0], tile_tokens(tile)
    pairs = q_heads * tokens // (TILE * _CONSUMERS)
    shape = (count, pairs, _CONSUMERS, TILE)
    kernel = plgpu.kernel(
        functools.partial(_body, tile, stages, pairs // tile.kv_heads),
        out_type=(
            jax.ShapeDtypeStruct((*shape, head_dim), tile.dtype),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        scratch_types=(
            tiles.shared(tile, TILE, _CONSUMERS),
            tiles.stages_of(tile, stages),
            tiles.stages_of(tile, stages),
            tiles.shared(tile, tile.keys, _CONSUMERS) if tile.quantized else None,
            plgpu.Barrier(num_barriers=_CONSUMERS),
            plgpu.Barrier(num_arrivals=tile.arrivals, num_barriers=stages),
            plgpu.Barrier(num_arrivals=tile.arrivals, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_CONSUMERS),
            plgpu.Barrier(),
        ),
        grid=(pairs, count),
        grid_names=("pair", "tile"),
        num_threads=_CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=device.compiler_params(),
        interpret=device.interpreter() if tile.interpret else None,
    )
    q = jnp.pad(q, ((0, max(-q.shape[0] % ALIGNMENT, TILE - q.shape[0])), (0, 0), (0, 0)))
    out, lse = kernel(q, *tiles.flat_pools(pools, head_dim), page_table, *chunks)
    return out.reshape(count, q_heads, tokens, head_dim), lse.reshape(count, q_heads, tokens)


def _body(
    tile: Tile,
    stages: int,
    pairs_per_head: int,
    q_gmem,  # [tokens, q_heads, head_dim]
    k_gmem,  # values [pages * kv_heads * page_size, head_dim], and scales
    v_gmem,
    table_gmem,  # [rows, max_pages]
    row_gmem,  # [tiles]
    token_gmem,  # [tiles]
    position_gmem,  # [tiles]
    last_gmem,  # [tiles]
    out_gmem,  # [tiles, pairs, consumers, TILE, head_dim]
    lse_gmem,  # [tiles, pairs, consumers, TILE]
    q_smem,  # [consumers, TILE, head_dim]; holds the results in the end
    k_smem,  # values [stages, keys, head_dim], and scales
    v_smem,
    wide_smem,  # [consumers, keys, head_dim]
    q_barriers,
    k_barriers,
    v_barriers,
    k_free,
    v_free,
    turn,
    values_clean,
):
    """One thread block: a tile of two heads, or of one."""
    pair, index, warpgroup = lax.axis_index("pair"), lax.axis_index("tile"), lax.axis_index("warpgroup")
    row, position, last = row_gmem[index], position_gmem[index], last_gmem[index]
    first, stop = 0, lax.div(last + tile.keys, tile.keys)
    if tile.sliding_window is not None:
        first = lax.div(jnp.maximum(position - tile.sliding_window + 1, 0), tile.keys)

    @pl.when(warpgroup == _CONSUMERS)
    def _produce():
        plgpu.set_max_registers(24, action="decrease")
        head = lax.div(pair, pairs_per_head)

        def load(block, carry):
            slot = lax.rem(block - first, stages)
            for free, pool_gmem, pool_smem, barriers in (
                (k_free, k_gmem, k_smem, k_barriers),
                (v_free, v_gmem, v_smem, v_barriers),
            ):

                @pl.when(block >= first + stages)
                def _wait(free=free):
                    plgpu.barrier_wait(free.at[slot])

                target, barrier = pool_smem.at(slot), barriers.at[slot]
                tiles.copy_block(tile, pool_gmem, table_gmem, row, head, block, last, target, barrier)
            return carry

        lax.fori_loop(first, stop, load, None)

    @pl.when(warpgroup < _CONSUMERS)
    def _consume():
        plgpu.set_max_registers(240, action="increase")
        mine, wide = q_smem.at[warpgroup], wide_smem.at[warpgroup] if tile.quantized else None
        if tile_tokens(tile) > TILE:
            head, ahead = pair, warpgroup * TILE
        else:
            head, ahead = pair * _CONSUMERS + warpgroup, 0
        own_position, own_token = position + ahead, token_gmem[index] + ahead
        own_token = own_token if tile.interpret else pl.multiple_of(own_token, ALIGNMENT)
        plgpu.copy_gmem_to_smem(q_gmem.at[pl.ds(own_token, TILE), head], mine, q_barriers.at[warpgroup])
        plgpu.barrier_wait(q_barriers.at[warpgroup])

        def give_turn():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def attend_block(block, state, masked):
            slot = lax.rem(block - first, stages)
            plgpu.barrier_wait(k_barriers.at[slot])
            scores = tiles.scores_of(tile, mine, k_smem.at(slot), wide, meanwhile=give_turn)
            plgpu.barrier_arrive(k_free.at[slot])
            if masked:
                scores = tiles.masked(tile, scores, block, own_position, step=1)
            state, weights = tiles.softmax(tile, tiles.State(*state), scores)
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(v_barriers.at[slot])
            plgpu.barrier_wait(turn)
            weights = tiles.scaled(tile, weights, v_smem.at(slot))
            values = tiles.widened(tile, v_smem.at(slot), wide)
            if masked:

                @pl.when((block + 1) * tile.keys > last + 1)
                def _drop_unwritten():
                    if tile.quantized:
                        tiles.zero_values_after(tile, values, block, last)
                        return

                    # Both multiply the same values: the first to do so cleans them.
                    @pl.when(warpgroup == 0)
                    def _zero():
                        tiles.zero_values_after(tile, values, block, last)
                        plgpu.barrier_arrive(values_clean)

                    @pl.when(warpgroup == 1)
                    def _wait_until_clean():
                        plgpu.barrier_wait(values_clean)

            state = tiles.add_values(tile, state, weights, values)
            plgpu.barrier_arrive(v_free.at[slot])
            return tuple(state)

        # The second is half a step behind the first.
        pl.when(warpgroup == 1)(give_turn)
        with_mask = functools.partial(attend_block, masked=True)
        state, whole = tuple(tiles.initial(tile)), first
        if tile.sliding_window is not None:
            # From this block on, the tile's last query has all of the block in its window.
            whole = own_position + TILE - 1 - tile.sliding_window + tile.keys
            whole = lax.div(jnp.maximum(whole, 0), tile.keys)
            whole = jnp.clip(whole, first, stop)
            state = lax.fori_loop(first, whole, with_mask, state)
        # Not past `last`, though a warpgroup's queries may all be: both must come to clean the last block.
        diagonal = jnp.clip(lax.div(jnp.minimum(own_position, last) + 1, tile.keys), whole, stop)
        state = lax.fori_loop(whole, diagonal, functools.partial(attend_block, masked=False), state)
        state = lax.fori_loop(diagonal, stop, with_mask, state)
        pl.when(warpgroup == 0)(give_turn)

        @pl.when(last >= 0)
        def _store():
            out, lse_gmem[index, pair, warpgroup] = tiles.finish(tiles.State(*state))
            mine[...] = out.astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, out_gmem.at[index, pair, warpgroup])
            plgpu.wait_smem_to_gmem(0)
