"""Puts together attention that was computed over disjoint parts of the KV, by its log-sum-exp."""

import jax
import jax.numpy as jnp


def merge(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges partial attentions of the same queries over disjoint sets of keys.

    Args:
      outs: `[parts, ..., head_dim]`, each part normalised over its own keys.
      lses: float32 `[parts, ...]`, the log-sum-exp of each part's scores; -inf where a part saw no key.

    Returns:
      (out `[..., head_dim]` in the dtype of `outs`, lse float32 `[...]`), as one attention over all keys gives.
      Where no part saw a key: zeros and -inf. Merging is associative up to rounding, so it can be done in a tree.

    Raises:
      ValueError: shapes that do not belong together.
    """
    if lses.shape != outs.shape[:-1]:
        raise ValueError(f"`lses` is {list(lses.shape)}; for `outs` {list(outs.shape)} it must be {outs.shape[:-1]}.")
    peak = jnp.max(lses, axis=0)
    peak = jnp.where(jnp.isneginf(peak), 0.0, peak)
    weights = jnp.exp(lses - peak[None])
    total = jnp.sum(weights, axis=0)
    # A part that saw nothing has weight 0, and its out may be anything.
    parts = jnp.where(weights[..., None] > 0, weights[..., None] * outs.astype(jnp.float32), 0.0)
    out = jnp.sum(parts, axis=0) / jnp.where(total > 0, total, 1.0)[..., None]
    return out.astype(outs.dtype), peak + jnp.log(total)
