"""Puts the splits of a decode together on Hopper GPUs, in one kernel where XLA would launch three."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from model.kernels.paged_attention.mosaic_gpu import device
from model.kernels.paged_attention.mosaic_gpu.tiles import LOWEST, Tile

THREADS = 128


def combine(tile: Tile, outs: jax.Array, lses: jax.Array, query_starts: jax.Array | None) -> jax.Array:
    """One attention of the parts that splits have computed, as `paged_attention.merge`.

    Args:
      tile: static facts; heads must be of a multiple of `THREADS`.
      outs: `[splits, places, kv_heads, group or more, head_dim]`, zeros where a split saw no key.
      lses: float32 `[splits, places, kv_heads, group or more]`, -inf where a split saw no key.
      query_starts: int32 `[rows + 1]`, where places are tokens: those that no row owns come out as zeros.

    Returns:
      out `[places, q_heads, head_dim]`.
    """
    splits, places, kv_heads, _, head_dim = outs.shape
    kernel = plgpu.kernel(
        functools.partial(_body, tile, splits),
        out_type=jax.ShapeDtypeStruct((places, kv_heads * tile.group, head_dim), outs.dtype),
        grid=(kv_heads * tile.group, places),
        grid_names=("head", "place"),
        compiler_params=device.compiler_params(),
        interpret=device.interpreter() if tile.interpret else None,
    )
    return kernel(outs, lses, query_starts)


def _body(tile: Tile, splits: int, outs_gmem, lses_gmem, starts_gmem, out_gmem):
    """One thread block: one query head of one place."""
    head, place = lax.axis_index("head"), lax.axis_index("place")
    source = (place, lax.div(head, tile.group), lax.rem(head, tile.group))

    def attended() -> jax.Array:
        # Unrolled, so that all loads are on their way at once.
        lses = [lses_gmem[split, *source] for split in range(splits)]
        peak = jnp.maximum(functools.reduce(jnp.maximum, lses), LOWEST)
        weights = [jnp.exp(lse - peak) for lse in lses]
        total = functools.reduce(jnp.add, weights)
        parts = [outs_gmem[split, *source].astype(jnp.float32) * weight for split, weight in enumerate(weights)]
        return functools.reduce(jnp.add, parts) / jnp.where(total > 0, total, 1.0)

    if starts_gmem is None:
        out_gmem[place, head] = attended().astype(out_gmem.dtype)
        return
    owned = (place >= starts_gmem[0]) & (place < starts_gmem[starts_gmem.shape[0] - 1])

    @pl.when(owned)
    def _attended():
        out_gmem[place, head] = attended().astype(out_gmem.dtype)

    @pl.when(~owned)
    def _nobodys():
        out_gmem[place, head] = jnp.zeros(out_gmem.shape[-1:], out_gmem.dtype)
