"""Decode on Hopper GPUs: one query per row, all query heads of a KV head in one tile, a row's KV split over blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.kernels.paged_attention.mosaic_gpu import device, tiles
from model.kernels.paged_attention.mosaic_gpu.tiles import TILE, Tile
from model.kernels.paged_attention.problem import Pools


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a decode is cut: thread blocks per row and KV head, and key blocks in flight in each."""

    splits: int
    stages: int


def attend(
    tile: Tile, plan: Plan, q: jax.Array, pools: Pools, page_table: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Attends one query of each row.

    Args:
      tile: static facts.
      plan: how the work is cut.
      q: `[rows, q_heads, head_dim]`.
      pools: K and V.
      page_table: int32 `[rows, max_pages]`.
      positions: int32 `[rows]`, the position of each row's query in its KV; -1 for rows that are not to be attended.

    Returns:
      (out `[splits, rows, q_heads, head_dim]`, lse float32 `[splits, rows, q_heads]`), to be merged over splits.
    """
    rows, head_dim = page_table.shape[0], tile.head_dim
    parts = rows * tile.kv_heads * plan.splits
    stored = _stored_rows(tile)
    kernel = plgpu.kernel(
        functools.partial(_body, tile, plan),
        out_type=(
            jax.ShapeDtypeStruct((parts, stored, head_dim), tile.dtype),
            jax.ShapeDtypeStruct((parts, TILE), jnp.float32),
        ),
        scratch_types=(
            tiles.shared(tile, TILE),
            tiles.stages_of(tile, plan.stages),
            tiles.stages_of(tile, plan.stages),
            tiles.shared(tile, tile.keys) if tile.quantized else None,
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=tile.arrivals, num_barriers=plan.stages),
            plgpu.Barrier(num_arrivals=tile.arrivals, num_barriers=plan.stages),
        ),
        grid=(plan.splits, tile.kv_heads, rows),
        grid_names=("split", "head", "row"),
        compiler_params=device.compiler_params(),
        interpret=device.interpreter() if tile.interpret else None,
    )
    # TMA reads whole swizzle tiles of 8 rows, so a group starts at one.
    q = q.reshape(rows, tile.kv_heads, tile.group, head_dim)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, stored - tile.group), (0, 0)))
    out, lse = kernel(q, *tiles.flat_pools(pools, head_dim), page_table, positions)
    out = out.reshape(rows, tile.kv_heads, plan.splits, stored, head_dim)[:, :, :, : tile.group]
    lse = lse.reshape(rows, tile.kv_heads, plan.splits, TILE)[..., : tile.group]
    return (
        jnp.moveaxis(out, 2, 0).reshape(plan.splits, rows, -1, head_dim),
        jnp.moveaxis(lse, 2, 0).reshape(plan.splits, rows, -1),
    )


def _stored_rows(tile: Tile) -> int:
    """Rows of a tile that are stored: the group, in whole swizzle tiles of 8."""
    return -(-tile.group // 8) * 8


def _body(
    tile: Tile,
    plan: Plan,
    q_gmem,  # [rows, kv_heads, stored rows, head_dim]
    k_gmem,  # values [pages * kv_heads * page_size, head_dim], and scales
    v_gmem,
    table_gmem,  # [rows, max_pages]
    positions_gmem,  # [rows]
    out_gmem,  # [rows * kv_heads * splits, stored rows, head_dim]
    lse_gmem,  # [rows * kv_heads * splits, TILE]
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
    position = positions_gmem[row]
    first, stop = _share(tile, plan, position, split)

    def load(block, slot, pool_gmem, pool_smem, barriers):
        target, barrier = pool_smem.at(slot), barriers.at[slot]
        tiles.copy_block(tile, pool_gmem, table_gmem, row, head, block, position, target, barrier)

    # The other rows of the tile are whatever was there: rows do not mix, and these are not stored.
    group_smem = q_smem.at[pl.ds(0, _stored_rows(tile))]
    plgpu.copy_gmem_to_smem(q_gmem.at[row, head], group_smem, q_barrier)
    for stage in range(plan.stages):

        @pl.when(first + stage < stop)
        def _fill(stage=stage):
            load(first + stage, stage, k_gmem, k_smem, k_barriers)
            load(first + stage, stage, v_gmem, v_smem, v_barriers)

    plgpu.barrier_wait(q_barrier)

    def attend_block(block, state):
        slot = lax.rem(block - first, plan.stages)
        ahead = block + plan.stages
        plgpu.barrier_wait(k_barriers.at[slot])
        scores = tiles.scores_of(tile, q_smem, k_smem.at(slot), wide_smem)

        @pl.when(ahead < stop)
        def _next_keys():
            load(ahead, slot, k_gmem, k_smem, k_barriers)

        scores = tiles.masked(tile, scores, block, position, step=0)
        state, weights = tiles.softmax(tiles.State(*state), scores)
        plgpu.barrier_wait(v_barriers.at[slot])
        values = tiles.widened(tile, v_smem.at(slot), wide_smem)

        @pl.when((block + 1) * tile.keys > position + 1)
        def _drop_unwritten():
            tiles.zero_values_after(tile, values, block, position)

        state = tiles.add_values(tile, state, weights, v_smem.at(slot), values)

        @pl.when(ahead < stop)
        def _next_values():
            load(ahead, slot, v_gmem, v_smem, v_barriers)

        return tuple(state)

    state = lax.fori_loop(first, stop, attend_block, tuple(tiles.initial(tile)))
    part = (row * tile.kv_heads + head) * plan.splits + split
    out, lse_gmem[part] = tiles.finish(tiles.State(*state))
    q_smem[...] = out.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(group_smem, out_gmem.at[part])
    plgpu.wait_smem_to_gmem(0)


def _share(tile: Tile, plan: Plan, position: jax.Array, split: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The first key block of a split, and the one after its last."""
    stop = lax.div(position + tile.keys, tile.keys)
    first = 0
    if tile.sliding_window is not None:
        first = lax.div(jnp.maximum(position - tile.sliding_window + 1, 0), tile.keys)
    share = lax.div(stop - first + plan.splits - 1, plan.splits)
    first = first + split * share
    return first, jnp.minimum(first + share, stop)
