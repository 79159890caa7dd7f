"""The SIR of many codes at once in JAX, float32: one Levinson recursion with the batch on vector lanes."""

import functools

import jax
import jax.numpy as jnp

from gan.sequences import sir_kernel
from gan.sequences.correlation import autocorrelation_f32


def filter_and_quotient(r: jax.Array, s: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x = T^-1 s, `[N, B]`, and q = s^T x, `[B]`, of autocorrelations r `[N, B]` and codes s `[N, B]`, float32.

    Both the predictor and its reversed copy are kept, zero beyond the order, so that every step is two products over
    whole columns and one shift by a single row: no gather, no data-dependent slice. Rows that are still zero are left
    out a quarter of the columns at a time.
    """
    length = s.shape[0]
    later = _shifted(r, -1)
    forward = backward = jnp.ones_like(s[:1])
    x, q, energy = jnp.zeros_like(s[:1]), jnp.zeros_like(r[0]), r[0]
    start = 0
    for rows in sorted({-(-length * quarter // 4) for quarter in (1, 2, 3, 4)}):
        forward, backward, x = (jnp.pad(y, ((0, rows - y.shape[0]), (0, 0))) for y in (forward, backward, x))
        step = functools.partial(_levinson_step, s[:rows], later[:rows])
        stop = rows if rows == length else rows - 1  # a step makes one more row, which the last one leaves out
        forward, backward, energy, x, q = jax.lax.fori_loop(start, stop, step, (forward, backward, energy, x, q))
        start = stop
    return x, q


_Recursion = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def _levinson_step(s: jax.Array, later: jax.Array, order: jax.Array, carry: _Recursion) -> _Recursion:
    del order
    forward, backward, energy, x, q = carry
    innovation = (backward * s).sum(0)
    gain = innovation / energy
    reflection = -(backward * later).sum(0) / energy
    delayed = _shifted(backward, 1)
    return (
        forward + reflection[None] * delayed,
        delayed + reflection[None] * forward,
        energy * (1 - reflection * reflection),
        x + gain[None] * backward,
        q + innovation * gain,
    )


def _shifted(x: jax.Array, rows: int) -> jax.Array:
    """x `[N, B]` moved by one row towards higher (1) or lower (-1) indices, zeros coming in."""
    zero = jnp.zeros_like(x[:1])
    return jnp.concatenate([zero, x[:-1]] if rows == 1 else [x[1:], zero])


def sir(codes: jax.Array) -> jax.Array:
    """SIR gamma of the best filter, float32 `[B]` of codes int8 `[B, N]` of +1 and -1."""
    if sir_kernel.usable():
        return jax.lax.platform_dependent(codes, cpu=sir_kernel.sir, default=sir_xla)
    return sir_xla(codes)


def sir_xla(codes: jax.Array) -> jax.Array:
    """`sir` in plain JAX, for any device."""
    s = codes.astype(jnp.float32)
    _, q = filter_and_quotient(jnp.round(autocorrelation_f32(s)).T, s.T)
    return q / (1 - q)


@jax.custom_vjp
def log_sir(s: jax.Array) -> jax.Array:
    """log gamma, float32 `[B]` of relaxed codes `[B, N]`, with the closed-form gradient (scale-free in each code)."""
    return _log_sir_forward(s)[0]


def _log_sir_forward(s: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    # The SIR has no scale; unit power keeps the recursion in range for small relaxed codes.
    s = s.astype(jnp.float32)
    scale = jax.lax.rsqrt((s * s).mean(-1, keepdims=True))
    unit = s * scale
    x, q = filter_and_quotient(autocorrelation_f32(unit).T, unit.T)
    return jnp.log(q) - jnp.log1p(-q), (unit, x.T, q * (1 - q) / scale[:, 0])


def _log_sir_backward(saved: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array]:
    # dq/ds = 2 x - 2 Toeplitz(C_x) s and d log gamma = dq / (q (1 - q)). Toeplitz(C_x) s: x correlated with s and back.
    s, x, scale = saved
    size = 2 * s.shape[-1]
    spectrum_x, spectrum_s = jnp.fft.rfft(x, 2 * size), jnp.fft.rfft(s, 2 * size)
    power = (spectrum_x * spectrum_x.conj()).real
    filtered = jnp.fft.irfft(power * spectrum_s, 2 * size)[..., : s.shape[-1]]
    return ((cotangent / scale)[:, None] * 2 * (x - filtered),)


log_sir.defvjp(_log_sir_forward, _log_sir_backward)
