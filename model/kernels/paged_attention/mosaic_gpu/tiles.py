"""What the Mosaic GPU kernels share: a tile of 64 queries against blocks of 64 keys, gathered into shared memory.

Scores live in base 2 (`exp2` is one instruction). Masked ones are `LOWEST`: below any score, yet finite, so that
differences of two of them are 0 and not NaN. What a query gathers before its first visible key is multiplied by 0 when
that key comes, so the mask alone decides what is attended.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Queries that one warpgroup multiplies at once (the M of wgmma), and keys of one step.
TILE = 64
LOWEST = -1e30
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tile:
    """The static side of a tile's attention."""

    kv_heads: int
    group: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype
    scale: float
    sliding_window: int | None
    soft_cap: float | None
    interpret: bool

    @property
    def copies(self) -> int:
        """Pages that fill one block of keys; 1 where a page holds one block or more."""
        return max(1, TILE // self.page_size)


class State(NamedTuple):
    """Online softmax: weighted values `[TILE, head_dim]`, highest score and sum of weights `[TILE]`, all float32."""

    weighted: jax.Array
    peak: jax.Array
    total: jax.Array


def shared(tile: Tile, *leading: int) -> Any:
    """Shared memory `[*leading, TILE, head_dim]` as TMA writes it and wgmma reads it, in a 128-byte swizzle."""
    transforms = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM((*leading, TILE, tile.head_dim), tile.dtype, transforms=transforms)


def copy_block(tile: Tile, pool_gmem, table_gmem, row, head, block, last, target_smem, barrier) -> None:
    """Starts the copy of a row's keys or values `block * TILE` and on, `[TILE, head_dim]`, page by page.

    The pool is flat, `[pages * kv_heads * page_size, head_dim]`. Past `last`, the row's last token, its last page is
    copied again: every block is whole, and no table entry past it is used.
    """
    for copy in range(tile.copies):
        if tile.page_size >= TILE:
            blocks = tile.page_size // TILE
            index, offset = lax.div(block, blocks), lax.rem(block, blocks) * TILE
        else:
            index, offset = jnp.minimum(block * tile.copies + copy, lax.div(last, tile.page_size)), 0
        size = min(tile.page_size, TILE)
        start = (table_gmem[row, index] * tile.kv_heads + head) * tile.page_size + offset
        start = start if tile.interpret else pl.multiple_of(start, size)
        target = target_smem.at[pl.ds(copy * size, size)] if tile.copies > 1 else target_smem
        plgpu.copy_gmem_to_smem(pool_gmem.at[pl.ds(start, size)], target, barrier)


def matmul(acc: jax.Array | None, a: Any, b_smem: Any, *, transpose_b: bool, interpret: bool) -> jax.Array:
    """`acc + a @ b` in float32; `a` in shared memory or registers, `b` in shared memory.

    The interpreter knows no wgmma with an operand in registers, so there it is a plain dot.
    """
    if interpret:
        product = jnp.dot(a[...], b_smem[...].T if transpose_b else b_smem[...], preferred_element_type=jnp.float32)
        return product if acc is None else acc + product
    b = _transposed(b_smem) if transpose_b else b_smem
    if acc is None:

        def from_zero(accumulator):
            plgpu.wgmma(accumulator, a, b)
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


def scores_of(tile: Tile, q_smem: Any, k_smem: Any) -> jax.Array:
    """Scores `[TILE, TILE]` of a block, in base 2."""
    scores = matmul(None, q_smem, k_smem, transpose_b=True, interpret=tile.interpret)
    if tile.soft_cap is None:
        return scores * (tile.scale * LOG2_E)
    # tanh by exp2, whose error is 2^-22; the hardware's tanh errs by 2^-11, times the cap.
    power = jnp.exp2(scores * (2 * LOG2_E * tile.scale / tile.soft_cap))
    cap = tile.soft_cap * LOG2_E
    return cap - 2 * cap / (power + 1)


def masked(tile: Tile, scores: jax.Array, block: jax.Array, position: jax.Array, step: int) -> jax.Array:
    """The scores of a block that the query of tile row i, at `position + i * step`, may see; `LOWEST` elsewhere."""
    key = _index(tile, scores.shape, 1) + block * TILE
    query = position
    if step:
        query = _index(tile, scores.shape, 0) * step + position
    seen = key <= query
    if tile.sliding_window is not None:
        seen = seen & (key > query - tile.sliding_window)
    return jnp.where(seen, scores, LOWEST)


def softmax(state: State, scores: jax.Array) -> tuple[State, jax.Array]:
    """The state rescaled to the new peak and with the new weights in its total; and the weights."""
    peak = jnp.maximum(state.peak, jnp.max(scores, axis=1))
    decay = jnp.exp2(state.peak - peak)
    weights = jnp.exp2(scores - lax.broadcast_in_dim(peak, scores.shape, [0]))
    weighted = state.weighted * lax.broadcast_in_dim(decay, state.weighted.shape, [0])
    return State(weighted, peak, state.total * decay + jnp.sum(weights, axis=1)), weights


def add_values(tile: Tile, state: State, weights: jax.Array, v_smem: Any) -> State:
    """The state with a block's values weighted in."""
    p = weights.astype(tile.dtype)
    return state._replace(weighted=matmul(state.weighted, p, v_smem, transpose_b=False, interpret=tile.interpret))


def zero_values_after(tile: Tile, v_smem: Any, block: jax.Array, last: jax.Array) -> None:
    """Zeroes a block's values past token `last`: slots that were never written may hold NaN, and 0 * NaN is NaN."""
    values = _laid_out(tile, v_smem[...])
    token = _index(tile, values.shape, 0) + block * TILE
    v_smem[...] = jnp.where(token <= last, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def finish(state: State) -> tuple[jax.Array, jax.Array]:
    """(out `[TILE, head_dim]`, natural log-sum-exp `[TILE]`), both float32; zeros and -inf where no key was seen."""
    seen = state.total > 0
    total = jnp.where(seen, state.total, 1.0)
    out = state.weighted / lax.broadcast_in_dim(total, state.weighted.shape, [0])
    return out, jnp.where(seen, state.peak / LOG2_E + jnp.log(total), -jnp.inf)
