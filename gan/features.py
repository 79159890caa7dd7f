"""The correlation head: what a discriminator sees instead of raw weights.

Every property searched for is a function of aperiodic correlations, and those are sums over diagonals of the Hopfield
matrix: linear, exact and without parameters. A code c and its matrix c c^T have the same features, and so have all
codes that differ by symmetries which the correlations cannot see.
"""

import math

import jax
import jax.numpy as jnp

from gan import hopfield
from gan.sequences.correlation import fft_size, lags, spectrum

_FLOOR = 0.05  # of the power spectrum, whose mean is 1, so that its logarithm exists at a zero


def as_set(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(flocks, sequences of a flock, chips of a sequence) of a problem's `shape`."""
    padded = (1,) * (3 - len(shape)) + shape
    return padded[0], padded[1], padded[2]


def feature_count(shape: tuple[int, ...]) -> int:
    """Features of one code."""
    flocks, _, length = as_set(shape)
    bins = fft_size(length) // 2 + 1
    return flocks * (length - 1 + bins) + flocks * (flocks - 1) // 2 * (2 * length - 1)


def code_features(codes: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Features float32 `[B, features]` of (relaxed) codes `[B, chips]`, through their spectra."""
    flocks, sequences, length = as_set(shape)
    transform = spectrum(codes.reshape(-1, flocks, sequences, length))
    power = (transform.real**2 + transform.imag**2).sum(2)
    own = lags(power, length)[..., 1:]
    mixed = []
    for k, other in _flock_pairs(flocks):
        cross = jnp.fft.irfft((transform[:, k].conj() * transform[:, other]).sum(1), axis=-1)
        mixed.append(jnp.concatenate([cross[:, -(length - 1) :], cross[:, :length]], axis=1))
    return _features(own, power, mixed, sequences * length)


def matrix_features(matrices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The same features of Hopfield matrices `[B, L, L]`, as sums over the diagonals of their blocks."""
    flocks, sequences, length = as_set(shape)
    blocks = hopfield.symmetric(matrices).reshape(-1, flocks, sequences, length, flocks, sequences, length)
    # Correlations of a flock add those of its sequences: blocks of the same sequence in both flocks.
    blocks = jnp.einsum("bkmilmj->bklij", blocks)
    sums = hopfield.diagonal_sums(blocks.reshape(-1, length, length)).reshape(-1, flocks, flocks, 2 * length - 1)
    own = jnp.stack([sums[:, k, k, length:] for k in range(flocks)], axis=1)
    energy = sequences * length
    zero = jnp.zeros((*own.shape[:2], fft_size(length) - 2 * length + 1))
    circular = jnp.concatenate([jnp.full((*own.shape[:2], 1), energy, own.dtype), own, zero, own[..., ::-1]], axis=-1)
    power = jnp.maximum(jnp.fft.rfft(circular, axis=-1).real, 0)  # a matrix of no code may have negative power
    return _features(own, power, [sums[:, k, other] for k, other in _flock_pairs(flocks)], energy)


def _flock_pairs(flocks: int) -> list[tuple[int, int]]:
    return [(k, other) for k in range(flocks) for other in range(k + 1, flocks)]


def _features(own: jax.Array, power: jax.Array, mixed: list[jax.Array], energy: int) -> jax.Array:
    scale = 1 / math.sqrt(energy)
    parts = [own * scale, jnp.log(power / energy + _FLOOR)]
    flat = [part.reshape(part.shape[0], -1) for part in parts]
    return jnp.concatenate(flat + [cross * scale for cross in mixed], axis=1)
