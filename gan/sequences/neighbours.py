"""Scores of all single-chip flips of a code at once, from how each flip changes the correlations.

Flipping chip k of s changes C_s(u) by -2 s_k (s_{k-u} + s_{k+u}), and C_st(u) by -2 s_k t_{k+u}: O(chips) an updated
lag instead of O(chips^2) a new correlation.
"""

import jax
import jax.numpy as jnp
import numpy as np

from gan.sequences import complementary, levinson, sir_kernel


def sir_of_flips(codes: jax.Array) -> jax.Array:
    """SIR after chip n alone is flipped, float32 `[B, N]` of codes int8 `[B, N]`."""
    if sir_kernel.usable():
        return jax.lax.platform_dependent(codes, cpu=sir_kernel.sir_of_flips, default=sir_of_flips_xla)
    return sir_of_flips_xla(codes)


def sir_of_flips_xla(codes: jax.Array) -> jax.Array:
    """`sir_of_flips` in plain JAX, for any device."""
    batch, length = codes.shape
    s = codes.astype(jnp.float32)
    padded = _padded(s)
    rows = [jnp.full_like(s, length)]
    for u in range(1, length):
        after = padded[:, length + u : 2 * length + u]
        correlation = (s * after).sum(-1, keepdims=True)
        rows.append(correlation - 2 * s * (padded[:, length - u : 2 * length - u] + after))
    flipped = s[:, :, None] * (1 - 2 * jnp.eye(length))[None]  # [B, chip, flip]
    r, s = jnp.stack(rows), flipped.transpose(1, 0, 2)
    _, q = levinson.filter_and_quotient(r.reshape(length, -1), s.reshape(length, -1))
    return (q / (1 - q)).reshape(batch, length)


def ob_zcp_residual_of_flips(pairs: jax.Array, kind: int) -> jax.Array:
    """`ob_zcp_residual` after one chip alone is flipped, float32 `[B, 2, N]` of pairs int8 `[B, 2, N]`."""
    length = pairs.shape[-1]
    s = pairs.astype(jnp.float32)
    padded = _padded(s)
    wanted = np.where(complementary.in_zone(length, kind), 0.0, 2.0)
    total = jnp.zeros_like(s)
    for u in range(1, length):
        after = padded[..., length + u : 2 * length + u]
        sums = (s * after).sum((-1, -2), keepdims=True)
        sums = sums - 2 * s * (padded[..., length - u : 2 * length - u] + after)
        total += jnp.square(jnp.abs(sums) - float(wanted[u]))
    return total


def mocss_residual_of_flips(sets: jax.Array) -> jax.Array:
    """`mocss_residual` after one chip alone is flipped, float32 `[B, K, M, N]` of sets int8 `[B, K, M, N]`."""
    flocks, length = sets.shape[1], sets.shape[-1]
    s = sets.astype(jnp.float32)
    padded = _padded(s)
    change = jnp.zeros_like(s)
    total = jnp.zeros((s.shape[0], 1, 1, 1))

    def add(sums: jax.Array, step: jax.Array) -> jax.Array:
        """How much the squares of `sums` `[B, K, 1, 1]` grow when `step` `[B, K, M, N]` is added to them."""
        return step * (2 * sums + step)

    for u in range(1, length):
        after = padded[..., length + u : 2 * length + u]
        own = (s * after).sum((-1, -2), keepdims=True)
        change += add(own, -2 * s * (padded[..., length - u : 2 * length - u] + after))
        total += jnp.square(own).sum(1, keepdims=True)
    for distance in range(1, flocks):
        other = jnp.roll(padded, -distance, axis=1)
        for u in range(1 - length, length):
            partner = other[..., length + u : 2 * length + u]
            cross = (s * partner).sum((-1, -2), keepdims=True)
            change += add(cross, -2 * s * partner)
            # Over all distances and signs of u, each pair of flocks is met twice.
            total += jnp.square(cross).sum(1, keepdims=True) / 2
    return total + change


def _padded(s: jax.Array) -> jax.Array:
    """`[..., 3N]`: sequences `[..., N]` between N zeros on either side."""
    length = s.shape[-1]
    return jnp.pad(s, [(0, 0)] * (s.ndim - 1) + [(length, length)])
