"""Scores of all single-chip flips of a code at once, from how each flip changes the correlations.

Flipping chip k of s changes C_s(u) by -2 s_k (s_{k-u} + s_{k+u}), and C_st(u) by -2 s_k t_{k+u}: O(chips) an updated
lag instead of O(chips^2) a new correlation.
"""

from collections.abc import Iterator

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
    s = pairs.astype(jnp.float32)
    wanted = _wanted(s.shape[-1], kind)
    total = jnp.zeros_like(s)
    for u, (sums, change) in enumerate(_pair_changes(s), start=1):
        total += jnp.square(jnp.abs(sums + change) - wanted[u])
    return total


def folded_residual_of_flips(pairs: jax.Array, kind: int) -> jax.Array:
    """`ob_zcp_residual` after one free chip of a folded pair is flipped, and with it the chip that depends on it.

    float32 `[B, N + (N+1)/2]` of pairs int8 `[B, 2, N]`. a[i] takes along the later of b[i] and b[N-1-i], a chip of b
    its mirror image, either middle none. Two chips of b that are u apart leave their product in C(u) as it was.
    """
    length = pairs.shape[-1]
    middle = length // 2
    s = pairs.astype(jnp.float32)
    wanted = _wanted(length, kind)
    nothing = jnp.zeros((s.shape[0], 1))
    total = jnp.zeros((s.shape[0], length + middle + 1))
    for u, (sums, change) in enumerate(_pair_changes(s), start=1):
        of_a, of_b = change[:, 0], change[:, 1]
        late = of_b[:, middle + 1 :]
        of_head = of_b[:, :middle] + late[:, ::-1]
        if u % 2 == 0:
            chip = (length - 1 - u) // 2
            kept = 4 * s[:, 1, chip] * s[:, 1, length - 1 - chip]
            of_head += kept[:, None] * (np.arange(middle) == chip).astype(np.float32)[None]
        with_a = jnp.concatenate([late[:, ::-1], nothing, late], axis=1)
        flips = jnp.concatenate([of_a + with_a, of_head, of_b[:, middle : middle + 1]], axis=1)
        total += jnp.square(jnp.abs(sums[:, 0] + flips) - wanted[u])
    return total


def _pair_changes(s: jax.Array) -> Iterator[tuple[jax.Array, jax.Array]]:
    """For u = 1 ... N-1: A(u) of pairs float32 `[B, 2, N]`, `[B, 1, 1]`, and how flips change it, `[B, 2, N]`."""
    length = s.shape[-1]
    padded = _padded(s)
    for u in range(1, length):
        after = padded[..., length + u : 2 * length + u]
        sums = (s * after).sum((-1, -2), keepdims=True)
        yield sums, -2 * s * (padded[..., length - u : 2 * length - u] + after)


def _wanted(length: int, kind: int) -> list[float]:
    """|A(u)| of an optimal pair."""
    return np.where(complementary.in_zone(length, kind), 0.0, 2.0).tolist()


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
