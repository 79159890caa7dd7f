"""Decode on Hopper GPUs: one query per row, all query heads of a KV head in one tile, a row's KV split over blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.kernels.paged_attention.merge import merge
from model.kernels.paged_attention.mosaic_gpu import device, tiles
from model.kernels.paged_attention.mosaic_gpu.combine import THREADS, combine
from model.kernels.paged_attention.mosaic_gpu.tiles import TILE, Tile
from model.kernels.paged_attention.problem import Pools, Ragged


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """How a decode is launched: thread blocks per row and KV head, and key blocks in flight in each.

    `by_token` puts results where their tokens are, for batches of decode rows; else where their rows are, of which
    there are fewer in batches with chunks.
    """

    splits: int
    stages: int
    by_token: bool


def attend(tile: Tile, launch: LaunchConfig, q: jax.Array, pools: Pools, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
    """Attends the rows that have one query.

    Args:
      tile: static facts.
      launch: thread blocks and stages.
      q: `[tokens, q_heads, head_dim]`.
      pools: K and V.
      ragged: which tokens are whose.

    Returns:
      (out `[tokens or rows, q_heads, head_dim]`, lse float32 `[tokens or rows, q_heads]`). Zeros and -inf for tokens
      that no row owns; anything for rows that have another number of queries, and for their tokens.
    """
    tokens, rows, head_dim = q.shape[0], ragged.page_table.shape[0], tile.head_dim
    places, stored = tokens if launch.by_token else rows, _stored_rows(tile)
    kernel = plgpu.kernel(
        functools.partial(_body, tile, launch),
        out_type=(
            jax.ShapeDtypeStruct((launch.splits, places, tile.kv_heads, stored, head_dim), tile.dtype),
            jax.ShapeDtypeStruct((launch.splits, places, tile.kv_heads, TILE), jnp.float32),
        ),
        scratch_types=(
            tiles.shared(tile, TILE),
            tiles.stages_of(tile, launch.stages),
            tiles.stages_of(tile, launch.stages),
            tiles.shared(tile, tile.keys) if tile.quantized else None,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=tile.arrivals, num_barriers=launch.stages),
            plgpu.Barrier(num_arrivals=tile.arrivals, num_barriers=launch.stages),
        ),
        grid=(launch.splits, tile.kv_heads, rows),
        grid_names=("split", "head", "row"),
        compiler_params=device.compiler_params(),
        interpret=device.interpreter() if tile.interpret else None,
    )
    # TMA reads whole swizzle tiles of 8 rows, so a group starts at one.
    q = q.reshape(tokens, tile.kv_heads, tile.group, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, stored - tile.group), (0, 0)))
    outs, lses = kernel(q, *tiles.flat_pools(pools, head_dim), *ragged)
    # Of what is merged here XLA computes what is used: the lse alone, where `combine` makes the results.
    out, lse = merge(outs, lses[..., :stored]) if launch.splits > 1 else (outs[0], lses[0])
    out, lse = out[:, :, : tile.group].reshape(places, -1, head_dim), lse[:, :, : tile.group].reshape(places, -1)
    starts = ragged.query_starts if launch.by_token else None
    combines = launch.splits > 1 and head_dim % THREADS == 0
    if combines:
        out = combine(tile, outs, lses, starts)
    if starts is None:
        return out, lse
    token = jnp.arange(tokens, dtype=jnp.int32)
    owned = (token >= starts[0]) & (token < starts[-1])
    return out if combines else jnp.where(owned[:, None, None], out, 0), jnp.where(owned[:, None], lse, -jnp.inf)


def _stored_rows(tile: Tile) -> int:
    """Rows of a tile that are stored: the group, in whole swizzle tiles of 8."""
    return -(-tile.group // 8) * 8


def _body(
    tile: Tile,
    launch: LaunchConfig,
    q_gmem,  # [tokens, kv_heads, stored rows, head_dim]
    k_gmem,  # values [pages * kv_heads * page_size, head_dim], and scales
    v_gmem,
    table_gmem,  # [rows, max_pages]
    lengths_gmem,  # [rows]
    starts_gmem,  # [rows + 1]
    out_gmem,  # [splits, places, kv_heads, stored rows, head_dim]
    lse_gmem,  # [splits, places, kv_heads, TILE]
    q_smem,  # [TILE, head_dim]; holds the result in the end
    k_smem,  # values [stages, keys, head_dim], and scales
    v_smem,
    wide_smem,  # [keys, head_dim]
    q_barrier,
    k_barriers,
    v_barriers,
):
    """One thread block, of one warpgroup: a share of the keys of one row and KV head."""
    row, head, split = lax.axis_index("row"), lax.axis_index("head"), lax.axis_index("split")
    token, position = starts_gmem[row], lengths_gmem[row] - 1
    first, stop = _share(tile, launch, position, split)
    # The other rows of the tile are whatever was there: rows do not mix, and these are not stored.
    group_smem = q_smem.at[pl.ds(0, _stored_rows(tile))]

    def load(block, slot, pool_gmem, pool_smem, barriers):
        target, barrier = pool_smem.at(slot), barriers.at[slot]
        tiles.copy_block(tile, pool_gmem, table_gmem, row, head, block, position, target, barrier)

    def attend_block(block, state):
        slot = lax.rem(block - first, launch.stages)
        ahead = block + launch.stages
        plgpu.barrier_wait(k_barriers.at[slot])
        scores = tiles.scores_of(tile, q_smem, k_smem.at(slot), wide_smem)

        @pl.when(ahead < stop)
        def _next_keys():
            load(ahead, slot, k_gmem, k_smem, k_barriers)

        scores = tiles.masked(tile, scores, block, position, step=0)
        state, weights = tiles.softmax(tile, tiles.State(*state), scores)
        plgpu.barrier_wait(v_barriers.at[slot])
        weights = tiles.scaled(tile, weights, v_smem.at(slot))
        values = tiles.widened(tile, v_smem.at(slot), wide_smem)

        @pl.when((block + 1) * tile.keys > position + 1)
        def _drop_unwritten():
            tiles.zero_values_after(tile, values, block, position)

        state = tiles.add_values(tile, state, weights, values)

        @pl.when(ahead < stop)
        def _next_values():
            load(ahead, slot, v_gmem, v_smem, v_barriers)

        return tuple(state)

    @pl.when(starts_gmem[row + 1] == token + 1)
    def _attend():
        plgpu.copy_gmem_to_smem(q_gmem.at[token, head], group_smem, q_barrier)
        for stage in range(launch.stages):

            @pl.when(first + stage < stop)
            def _fill(stage=stage):
                load(first + stage, stage, k_gmem, k_smem, k_barriers)
                load(first + stage, stage, v_gmem, v_smem, v_barriers)

        plgpu.barrier_wait(q_barrier)
        state = lax.fori_loop(first, stop, attend_block, tuple(tiles.initial(tile)))
        place = token if launch.by_token else row
        out, lse_gmem[split, place, head] = tiles.finish(tiles.State(*state))
        q_smem[...] = out.astype(tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(group_smem, out_gmem.at[split, place, head])
        plgpu.wait_smem_to_gmem(0)


def _share(tile: Tile, launch: LaunchConfig, position: jax.Array, split: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first key block of a split, and the one after its last."""
    stop = lax.div(position + tile.keys, tile.keys)
    first = 0
    if tile.sliding_window is not None:
        first = lax.div(jnp.maximum(position - tile.sliding_window + 1, 0), tile.keys)
    share = lax.div(stop - first + launch.splits - 1, launch.splits)
    first = first + split * share
    return first, jnp.minimum(first + share, stop)
