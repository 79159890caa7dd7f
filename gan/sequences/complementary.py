"""Complementary codes: Golay pairs, mutually orthogonal sets (MOCSS, CCC), optimal odd-length Z-complementary pairs."""

import jax
import jax.numpy as jnp
import numpy as np

from gan.sequences.correlation import autocorrelation, cross_correlation, lags, spectrum


def pair_autocorrelation(pairs: np.ndarray) -> np.ndarray:
    """A(u) = C_a(u) + C_b(u), exact int64 `[..., N]` of pairs `[..., 2, N]`."""
    return autocorrelation(pairs).sum(-2)


def is_golay(pairs: np.ndarray) -> np.ndarray:
    """Whether A(u) = 0 for all u > 0, bool `[...]` of pairs `[..., 2, N]`."""
    return (pair_autocorrelation(pairs)[..., 1:] == 0).all(-1)


def mocss_residual(sets: np.ndarray) -> np.ndarray:
    """Energy of everything that must vanish in a (K,M,N)-MOCSS, exact int64 `[...]` of sets `[..., K, M, N]`.

    The sum of AACS_k(u)^2 over flocks and u > 0, plus the squared cross terms over pairs of flocks and all lags.
    """
    flocks = sets.shape[-3]
    auto = autocorrelation(sets).sum(-2)[..., 1:]
    energy = (auto**2).sum((-1, -2))
    for k in range(flocks):
        for other in range(k + 1, flocks):
            cross = cross_correlation(sets[..., k, :, :], sets[..., other, :, :]).sum(-2)
            energy = energy + (cross**2).sum(-1)
    return energy


def alphaseq_metric(sets: np.ndarray) -> np.ndarray:
    """AlphaSeq's metric (1810.01218, eq. 5), int64 `[...]` of sets `[..., K, M, N]`: 0 for a MOCSS.

    The summed magnitudes of cyclic and flipped correlations: of each flock at shifts 1 ... N-1, and of each pair of
    flocks at shifts 0 ... N-1 (where shift 0, at which both agree, counts once).
    """
    flocks, length = sets.shape[-3], sets.shape[-1]
    total = np.zeros(sets.shape[:-3], np.int64)
    for k in range(flocks):
        for other in range(k, flocks):
            full = cross_correlation(sets[..., k, :, :], sets[..., other, :, :]).sum(-2)
            head, tail = full[..., length:], full[..., : length - 1]
            total += (np.abs(head + tail) + np.abs(head - tail)).sum(-1)
            if other != k:
                total += np.abs(full[..., length - 1])
    return total


def in_zone(length: int, kind: int) -> np.ndarray:
    """The lags at which a Z-optimal pair of odd length must vanish, bool `[N]` (lag 0 is not one of them).

    Z = (N+1)/2. Type I: lags 1 ... Z-1; type II: lags N-Z+1 ... N-1.

    Raises:
        ValueError: if the length is even or below 3, or the kind is not 1 or 2.
    """
    if length < 3 or length % 2 == 0:
        raise ValueError(f"`length` is {length}; an odd-length Z-complementary pair needs an odd length from 3.")
    if kind not in (1, 2):
        raise ValueError(f"`kind` is {kind}; it must be 1 (zone beside lag 0) or 2 (zone at the largest lags).")
    lag, zone = np.arange(length), (length + 1) // 2
    return (lag >= 1) & (lag < zone) if kind == 1 else lag > length - zone


def zero_zone(pairs: np.ndarray, kind: int) -> np.ndarray:
    """Width Z of the zero correlation zone, int64 `[...]` of pairs `[..., 2, N]`, lag 0 counted; at least 1."""
    zero = pair_autocorrelation(pairs)[..., 1:] == 0
    ordered = zero if kind == 1 else zero[..., ::-1]
    return 1 + np.logical_and.accumulate(ordered, axis=-1).sum(-1)


def is_z_optimal(pairs: np.ndarray, kind: int) -> np.ndarray:
    """Whether the zone reaches its bound Z = (N+1)/2, bool `[...]` of pairs `[..., 2, N]`."""
    return zero_zone(pairs, kind) >= (pairs.shape[-1] + 1) // 2


def ob_zcp_residual(pairs: np.ndarray, kind: int) -> np.ndarray:
    """Distance from an optimal OB-ZCP, exact int64 `[...]` of pairs `[..., 2, N]`: 0 for an optimal pair.

    The sum of A(u)^2 over the zone and of (|A(u)| - 2)^2 over the other lags u > 0.
    """
    zone = in_zone(pairs.shape[-1], kind)[1:]
    sums = np.abs(pair_autocorrelation(pairs)[..., 1:])
    return ((sums - np.where(zone, 0, 2)) ** 2).sum(-1)


def mocss_energy(sets: jax.Array, *, exact: bool) -> jax.Array:
    """`mocss_residual` in JAX, float32 `[B]` of `[B, K, M, N]`; `exact` rounds correlations, as codes need."""
    flocks, length = sets.shape[1], sets.shape[-1]
    transform = spectrum(sets)
    energy = jnp.zeros(sets.shape[0])
    for k in range(flocks):
        own = lags((transform[:, k].real ** 2 + transform[:, k].imag ** 2).sum(1), length)[:, 1:]
        energy += _square_sum(own, exact)
        for other in range(k + 1, flocks):
            cross = jnp.fft.irfft((transform[:, k].conj() * transform[:, other]).sum(1), axis=-1)
            energy += _square_sum(cross, exact)
    return energy


def ob_zcp_energy(pairs: jax.Array, kind: int, *, exact: bool) -> jax.Array:
    """`ob_zcp_residual` in JAX, float32 `[B]` of `[B, 2, N]`; `exact` as in `mocss_energy`."""
    length = pairs.shape[-1]
    transform = spectrum(pairs)
    sums = lags((transform.real**2 + transform.imag**2).sum(1), length)[:, 1:]
    wanted = jnp.asarray(np.where(in_zone(length, kind)[1:], 0.0, 2.0), jnp.float32)
    return _square_sum(jnp.abs(sums) - wanted[None], exact)


def _square_sum(x: jax.Array, exact: bool) -> jax.Array:
    x = jnp.round(x) if exact else x
    return (x * x).sum(-1)
