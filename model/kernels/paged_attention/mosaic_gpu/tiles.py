"""What the Mosaic GPU kernels share: a tile of 64 queries against blocks of keys, gathered into shared memory.

Peaks live in base 2 (`exp2` is one instruction, to which the scores' factor adds none). Masked scores are `LOWEST`:
below any score, yet finite, so that differences of two of them are 0 and not NaN. What a query gathers before its first
visible key is multiplied by 0 when that key comes, so the mask alone decides what is attended.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.kernels.paged_attention.problem import Pools

# Queries that one warpgroup multiplies at once: the M of wgmma.
TILE = 64
LOWEST = -1e30
LOG2_E = math.log2(math.e)
# Of scores that scale and soft cap are yet to come to: with less, masked ones would not be lowest any more.
LEAST_SCALE = 1e-6
# Matrices of 8 n rows in registers, spread like those of `WGMMA` within a warp, which takes 8 columns.
_ROWS = plgpu.Layout.TILED(
    mgpu.fragmented_array.Tiling(((8, 32), (8, 8), (2,))), warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1
)
# Older versions of jax ask for an index, newer ones take only the reference.
_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_WHOLE = ((),) if _INDEX is not None and _INDEX.default is inspect.Parameter.empty else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """The static side of a tile's attention; `keys` are those of one step."""

    keys: int
    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype
    kv_dtype: jnp.dtype
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    interpret: bool

    @property
    def quantized(self) -> bool:
        """Whether the pools hold scaled one-byte values, which are widened in shared memory before each product."""
        return self.kv_dtype != self.dtype

    @property
    def factor(self) -> float:
        """What brings the scores of `scores_of` to base 2."""
        return LOG2_E * (self.scale if self.soft_cap is None else 1.0)

    @property
    def copies(self) -> int:
        """Pages that fill one block of keys; 1 where a page holds one block or more."""
        return max(1, self.keys // self.page_size)

    @property
    def arrivals(self) -> int:
        """Copies that bring one block of keys or of values."""
        return self.copies * (2 if self.quantized else 1)

    @property
    def block_bytes(self) -> int:
        """Shared memory of one block of keys, with its scales."""
        return self.keys * (self.head_dim * self.kv_dtype.itemsize + (4 if self.quantized else 0))

    @property
    def wide_bytes(self) -> int:
        """Shared memory in which a warpgroup widens a block."""
        return self.keys * self.head_dim * self.dtype.itemsize if self.quantized else 0


class Block(NamedTuple):
    """Shared memory of the keys or values in flight: `[stages, keys, head_dim]`, scales float32 `[stages, keys]`."""

    values: Any
    scales: Any = None

    def at(self, slot: Any) -> "Block":
        """Those of one stage."""
        return Block(self.values.at[slot], None if self.scales is None else self.scales.at[slot])


class State(NamedTuple):
    """Online softmax: weighted values `[TILE, head_dim]`, highest score and sum of weights `[TILE]`, all float32."""

    weighted: jax.Array
    peak: jax.Array
    total: jax.Array


def shared(tile: Tile, rows: int, *leading: int, dtype: Any = None) -> Any:
    """Shared memory `[*leading, rows, head_dim]` as TMA writes it and wgmma reads it, in a swizzle of 128 bytes.

    Of 64 bytes for one-byte values, which are taken 64 columns at a time, and for blocks of 32 keys: wgmma contracts
    as many keys as fill a swizzle.
    """
    dtype = jnp.dtype(dtype or tile.dtype)
    lanes = min(2 * tile.keys // dtype.itemsize, 64)
    transforms = (plgpu.TilingTransform((8, lanes)), plgpu.SwizzleTransform(lanes * dtype.itemsize))
    return plgpu.SMEM((*leading, rows, tile.head_dim), dtype, transforms=transforms)


def stages_of(tile: Tile, stages: int) -> Block:
    """Shared memory for `stages` blocks of keys, or of values."""
    scales = plgpu.SMEM((stages, tile.keys), jnp.float32) if tile.quantized else None
    return Block(shared(tile, tile.keys, stages, dtype=tile.kv_dtype), scales)


def flat_pools(pools: Pools, head_dim: int) -> tuple[Block, Block]:
    """Keys and values as rows `[pages * kv_heads * page_size, head_dim]`, and their scales flat."""

    def flat(pool: jax.Array, scale: jax.Array | None) -> Block:
        return Block(pool.reshape(-1, head_dim), None if scale is None else scale.reshape(-1))

    return flat(pools.k, pools.k_scale), flat(pools.v, pools.v_scale)


def copy_block(tile: Tile, pool: Block, table_gmem, row, head, block, last, target: Block, barrier) -> None:
    """Starts the copy of a row's keys or values `block * tile.keys` and on, page by page, with their scales.

    Past `last`, the row's last token, its last page is copied again: every block is whole, and no table entry past it
    is used.
    """
    for copy in range(tile.copies):
        if tile.page_size >= tile.keys:
            blocks = tile.page_size // tile.keys
            index, offset = lax.div(block, blocks), lax.rem(block, blocks) * tile.keys
        else:
            index, offset = jnp.minimum(block * tile.copies + copy, lax.div(last, tile.page_size)), 0
        size = min(tile.page_size, tile.keys)
        start = (table_gmem[row, index] * tile.kv_heads + head) * tile.page_size + offset
        start = start if tile.interpret else pl.multiple_of(start, size)
        here = pl.ds(copy * size, size)
        for source, destination in zip(pool, target, strict=True):
            if destination is not None:
                part = destination.at[here] if tile.copies > 1 else destination
                plgpu.copy_gmem_to_smem(source.at[pl.ds(start, size)], part, barrier)


def widened(tile: Tile, block: Block, wide_smem: Any) -> Any:
    """The block's values as wgmma multiplies them: where they are, or in `wide_smem` if they are of one byte."""
    if not tile.quantized:
        return block.values
    # Nobody may still multiply what was there before.
    plgpu.commit_smem()
    layout = plgpu.Layout.WGMMA_UPCAST_2X
    for start in range(0, tile.head_dim, 64):
        part = (slice(None), pl.ds(start, 64))
        values = _load(tile, block.values.at[*part], layout)
        if jnp.issubdtype(tile.kv_dtype, jnp.floating):
            # The one conversion of such bytes that the hardware has; bfloat16 takes a detour.
            values = values.astype(jnp.float16)
            values = values if tile.dtype == jnp.float16 else values.astype(jnp.float32)
        wide_smem[*part] = values.astype(tile.dtype)
    plgpu.commit_smem()
    return wide_smem


def _scales(tile: Tile, block: Block) -> jax.Array:
    """The scales of a block's keys `[keys]`, spread as the columns of scores are."""
    return _load(tile, block.scales, plgpu.Layout.WGMMA.reduce(0))


def _load(tile: Tile, ref: Any, layout: Any) -> jax.Array:
    """What `ref` holds, in registers of this layout."""
    if tile.interpret:
        return ref[...]
    return plgpu.load(ref, *_WHOLE, layout=layout)


def matmul(
    acc: jax.Array | None,
    a: Any,
    b_smem: Any,
    *,
    transpose_b: bool,
    interpret: bool,
    meanwhile: Callable[[], None] = lambda: None,
) -> jax.Array:
    """`acc + a @ b` in float32; `a` in shared memory or registers, `b` in shared memory.

    `meanwhile` is done when the product has started. The interpreter knows no wgmma with an operand in registers, so
    there it is a plain dot.
    """
    if interpret:
        product = jnp.dot(a[...], b_smem[...].T if transpose_b else b_smem[...], preferred_element_type=jnp.float32)
        # wgmma reads as TMA writes; a plain read must be committed before a copy may overwrite what it has read.
        plgpu.commit_smem()
        meanwhile()
        return product if acc is None else acc + product
    b = _transposed(b_smem) if transpose_b else b_smem
    if acc is None:

        def from_zero(accumulator):
            plgpu.wgmma(accumulator, a, b)
            meanwhile()
            return accumulator[...]

        return pl.run_scoped(from_zero, plgpu.ACC((a.shape[0], b.shape[1]), jnp.float32))
    onto: Any = pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))
    return onto(plgpu.ACC.init(acc))


def _transposed(ref: Any) -> Any:
    return plgpu.transpose_ref(ref, (1, 0)) if jax.__version_info__ < (0, 11) else ref.transpose((1, 0))


def _laid_out(tile: Tile, array: jax.Array) -> jax.Array:
    """The array spread over a warpgroup's registers as wgmma wants its rows; the interpreter has no registers."""
    if tile.interpret:
        return array
    layout = plgpu.Layout.WGMMA if array.ndim == 2 else plgpu.Layout.WGMMA.reduce(1)
    return plgpu.layout_cast(array, layout)


def _index(tile: Tile, shape: tuple[int, ...], axis: int) -> jax.Array:
    return _laid_out(tile, lax.broadcasted_iota(jnp.int32, shape, axis))


def initial(tile: Tile) -> State:
    """The state before the first block."""
    return State(
        _laid_out(tile, jnp.zeros((TILE, tile.head_dim), jnp.float32)),
        _laid_out(tile, jnp.full((TILE,), LOWEST, jnp.float32)),
        _laid_out(tile, jnp.zeros((TILE,), jnp.float32)),
    )


def scores_of(
    tile: Tile, q_smem: Any, keys: Block, wide_smem: Any, meanwhile: Callable[[], None] = lambda: None
) -> jax.Array:
    """Scores `[TILE, tile.keys]` of a block, yet to be multiplied by `tile.factor`; `meanwhile` as `matmul` has it."""
    # Before the fences of `widened`, as the next copy overwrites them.
    scales = _scales(tile, keys) if tile.quantized else None
    k_smem = widened(tile, keys, wide_smem)
    scores = matmul(None, q_smem, k_smem, transpose_b=True, interpret=tile.interpret, meanwhile=meanwhile)
    if scales is not None:
        scores = scores * lax.broadcast_in_dim(scales, scores.shape, [1])
    if tile.soft_cap is None:
        return scores
    # tanh by exp2, whose error is 2^-22; the hardware's tanh errs by 2^-11, times the cap.
    power = jnp.exp2(scores * (2 * LOG2_E * tile.scale / tile.soft_cap))
    return tile.soft_cap - 2 * tile.soft_cap / (power + 1)


def masked(tile: Tile, scores: jax.Array, block: jax.Array, position: jax.Array, step: int) -> jax.Array:
    """The scores of a block that the query of tile row i, at `position + i * step`, may see; `LOWEST` elsewhere."""
    key = _index(tile, scores.shape, 1) + block * tile.keys
    query = position
    if step:
        query = _index(tile, scores.shape, 0) * step + position
    seen = key <= query
    if tile.sliding_window is not None:
        seen = seen & (key > query - tile.sliding_window)
    return jnp.where(seen, scores, LOWEST)


def softmax(tile: Tile, state: State, scores: jax.Array) -> tuple[State, jax.Array]:
    """The state rescaled to the new peak and with the new weights in its total; and the weights."""
    peak = jnp.maximum(state.peak, jnp.max(scores, axis=1) * tile.factor)
    decay = jnp.exp2(state.peak - peak)
    weights = jnp.exp2(scores * tile.factor - lax.broadcast_in_dim(peak, scores.shape, [0]))
    weighted = state.weighted * lax.broadcast_in_dim(decay, state.weighted.shape, [0])
    return State(weighted, peak, state.total * decay + jnp.sum(weights, axis=1)), weights


def scaled(tile: Tile, weights: jax.Array, values: Block) -> jax.Array:
    """The weights times the scales of a block's values; before `widened`, as the next copy overwrites the scales."""
    if not tile.quantized:
        return weights
    scales = lax.broadcast_in_dim(_scales(tile, values), weights.shape, [1])
    # A slot that was never written may have a scale of NaN, and 0 * NaN is NaN.
    return jnp.where(weights > 0, weights * scales, 0.0)


def add_values(tile: Tile, state: State, weights: jax.Array, v_smem: Any) -> State:
    """The state with a block's values weighted in."""
    p = weights.astype(tile.dtype)
    return state._replace(weighted=matmul(state.weighted, p, v_smem, transpose_b=False, interpret=tile.interpret))


def zero_values_after(tile: Tile, v_smem: Any, block: jax.Array, last: jax.Array) -> None:
    """Zeroes a block's values past token `last`: slots that were never written may hold NaN, and 0 * NaN is NaN."""
    # By parts, or they would not fit the registers beside a tile's sums and weights.
    rows = min(tile.keys, 64)
    for row, column in itertools.product(range(0, tile.keys, rows), range(0, tile.head_dim, 64)):
        part = (pl.ds(row, rows), pl.ds(column, 64))
        values = _load(tile, v_smem.at[*part], _ROWS)
        token = lax.broadcasted_iota(jnp.int32, values.shape, 0)
        token = (token if tile.interpret else plgpu.layout_cast(token, _ROWS)) + block * tile.keys + row
        v_smem[*part] = jnp.where(token <= last, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def finish(state: State) -> tuple[jax.Array, jax.Array]:
    """(out `[TILE, head_dim]`, natural log-sum-exp `[TILE]`), both float32; zeros and -inf where no key was seen."""
    seen = state.total > 0
    total = jnp.where(seen, state.total, 1.0)
    out = state.weighted / lax.broadcast_in_dim(total, state.weighted.shape, [0])
    return out, jnp.where(seen, state.peak / LOG2_E + jnp.log(total), -jnp.inf)
