"""Pulse compression: merit factor, mismatched filter (MMF) and its signal-to-interference ratio (SIR), in NumPy.

A code s is sent and filtered with x; every other range bin adds a shifted copy J_n s. With T = Toeplitz(C_s) and
q = s^T T^-1 s the best filter is x = T^-1 s and its SIR is gamma = q / (1 - q).
"""

import fractions

import numpy as np

from gan.sequences.correlation import autocorrelation


def merit_factor(codes: np.ndarray) -> np.ndarray:
    """N^2 / (2 sum_{u>0} C(u)^2), float64 `[...]` of codes `[..., N]`: the SIR of the matched filter x = s."""
    correlation = autocorrelation(codes)
    return codes.shape[-1] ** 2 / (2 * (correlation[..., 1:] ** 2).sum(-1))


def sir_of_filter(code: np.ndarray, filter_: np.ndarray) -> float:
    """(x^T s)^2 / sum_{n != 0} (x^T J_n s)^2 of one code `[N]` and one filter `[N]`: the definition."""
    code, filter_ = np.asarray(code, np.float64), np.asarray(filter_, np.float64)
    outputs = np.correlate(filter_, code, "full")
    peak = outputs[code.size - 1]
    return float(peak**2 / (np.square(outputs).sum() - peak**2))


def filter_and_quotient(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x = T^-1 s, float64 `[..., N]`, and q = s^T x `[...]` of codes `[..., N]`, by the Levinson recursion.

    The order-k backward predictors b_k are orthogonal under T with squared norms E_k, hence
    x = sum_k (b_k . s) b_k / E_k and q = sum_k (b_k . s)^2 / E_k.
    """
    s = np.asarray(codes, np.float64)
    r = autocorrelation(s)
    length = s.shape[-1]
    forward, backward = np.zeros_like(s), np.zeros_like(s)
    forward[..., 0] = backward[..., 0] = 1.0
    energy = r[..., 0]
    x, q = np.zeros_like(s), np.zeros(s.shape[:-1])
    for order in range(length):
        innovation = (backward * s).sum(-1)
        x += (innovation / energy)[..., None] * backward
        q += innovation**2 / energy
        if order == length - 1:
            break
        reflection = -(backward[..., :-1] * r[..., 1:]).sum(-1) / energy
        delayed = np.roll(backward, 1, axis=-1)
        backward = delayed + reflection[..., None] * forward
        forward = forward + reflection[..., None] * delayed
        energy = energy * (1 - reflection**2)
    return x, q


def mismatched_filter(codes: np.ndarray) -> np.ndarray:
    """The filter x = T^-1 s of largest SIR, float64 `[..., N]` of codes `[..., N]`; its scale is arbitrary."""
    return filter_and_quotient(codes)[0]


def sir(codes: np.ndarray) -> np.ndarray:
    """SIR gamma of the best filter, float64 `[...]` of codes (or relaxed codes) `[..., N]`."""
    q = filter_and_quotient(codes)[1]
    return q / (1 - q)


def sir_gradient(codes: np.ndarray) -> np.ndarray:
    """d gamma / d s, float64 `[..., N]`: (2 x - 2 Toeplitz(C_x) s) / (1 - q)^2. Orthogonal to s: gamma has no scale."""
    s = np.asarray(codes, np.float64)
    x, q = filter_and_quotient(codes)
    length = s.shape[-1]
    offsets = np.abs(np.arange(length)[:, None] - np.arange(length))
    toeplitz = autocorrelation(x)[..., offsets]
    return 2 * (x - (toeplitz * s[..., None, :]).sum(-1)) / (1 - q[..., None]) ** 2


def noise_loss_db(code: np.ndarray) -> float:
    """10 log10(N x.x / (x.s)^2) of one code: what the mismatched filter loses against white noise, in dB."""
    x = mismatched_filter(code)
    return float(10 * np.log10(code.size * (x @ x) / (x @ code) ** 2))


def sir_exact(code: np.ndarray) -> fractions.Fraction:
    """The SIR of one integer code `[N]` as a rational number: the Levinson recursion in exact arithmetic.

    Raises:
        ValueError: if the code is not one sequence of +1 and -1.
    """
    code = np.asarray(code)
    if code.ndim != 1 or not np.isin(code, (-1, 1)).all():
        raise ValueError(f"`code` must be one sequence of +1 and -1, got shape {code.shape}.")
    s, r = code.tolist(), autocorrelation(code).tolist()
    # Fraction-free: predictors scaled to integers, divided by the previous determinant as in Bareiss elimination.
    forward, backward = [1], [1]
    determinant, previous = r[0], 1
    q = fractions.Fraction(0)
    for order in range(len(s)):
        innovation = sum(b * chip for b, chip in zip(backward, s, strict=False))
        q += fractions.Fraction(innovation**2, determinant * previous)
        if order == len(s) - 1:
            break
        moment = sum(b * lag for b, lag in zip(backward, r[1:], strict=False))
        delayed, padded = [0, *backward], [*forward, 0]
        backward = [(determinant * b - moment * f) // previous for b, f in zip(delayed, padded, strict=True)]
        forward = [(determinant * f - moment * b) // previous for f, b in zip(padded, delayed, strict=True)]
        determinant, previous = (determinant**2 - moment**2) // previous, determinant
    return q / (1 - q)
