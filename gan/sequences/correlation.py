"""Aperiodic correlation: exact in NumPy, batched and differentiable in JAX."""

import jax
import jax.numpy as jnp
import numpy as np


def autocorrelation(codes: np.ndarray) -> np.ndarray:
    """C(u) = sum_i s_i s_{i+u}, u = 0 ... N-1, `[..., N]` of codes `[..., N]`: int64 of integers, else float64."""
    s = _widened(codes)
    length = s.shape[-1]
    return np.stack([(s[..., : length - u] * s[..., u:]).sum(-1) for u in range(length)], axis=-1)


def cross_correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """C_ab(u) = sum_i a_i b_{i+u} for u = -(N-1) ... N-1, `[..., 2N-1]` of codes `[..., N]`, as `autocorrelation`."""
    a, b = _widened(a), _widened(b)
    length = a.shape[-1]
    later = [(a[..., : length - u] * b[..., u:]).sum(-1) for u in range(length)]
    earlier = [(b[..., : length - u] * a[..., u:]).sum(-1) for u in range(length - 1, 0, -1)]
    return np.stack(earlier + later, axis=-1)


def _widened(codes: np.ndarray) -> np.ndarray:
    codes = np.asarray(codes)
    return codes.astype(np.float64 if codes.dtype.kind == "f" else np.int64)


def fft_size(length: int) -> int:
    """The power of two from which linear correlation of sequences of this length does not wrap around."""
    return 1 << (2 * length - 1).bit_length()


def spectrum(x: jax.Array) -> jax.Array:
    """complex64 `[..., size/2 + 1]`: the transform of sequences `[..., N]`, long enough for linear correlation."""
    return jnp.fft.rfft(x.astype(jnp.float32), n=fft_size(x.shape[-1]), axis=-1)


def lags(power: jax.Array, length: int) -> jax.Array:
    """Correlation at lags 0 ... N-1, float32 `[..., N]`, of a (cross) power spectrum."""
    return jnp.fft.irfft(power, axis=-1)[..., :length]


def autocorrelation_f32(x: jax.Array) -> jax.Array:
    """C(u) for u = 0 ... N-1, float32 `[..., N]` of `[..., N]`; differentiable. Rounded, it is exact for codes."""
    transform = spectrum(x)
    return lags(transform.real**2 + transform.imag**2, x.shape[-1])
