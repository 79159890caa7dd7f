"""What a signal designer asks of one binary code, with its matched and its mismatched filter; text forms of codes."""

import dataclasses

import numpy as np

from gan.sequences import pulse_compression
from gan.sequences.correlation import autocorrelation


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodeFigures:
    """Figures of one code of N chips.

    Attributes:
        sir: of the best length-N mismatched filter; `sir_db` in dB.
        noise_loss_db: what that filter loses against white noise, beside the matched filter.
        filter_psl_db: largest sidelobe of that filter's output, over its peak.
        merit_factor: N^2 / ISL, the SIR of the matched filter.
        psl: largest |C(u)|, u > 0.
        isl: sum of C(u)^2 over u != 0.
    """

    sir: float
    sir_db: float
    noise_loss_db: float
    filter_psl_db: float
    merit_factor: float
    psl: int
    isl: int


def code_figures(code: np.ndarray) -> CodeFigures:
    """The figures of a code int8 `[N]`, N > 1."""
    sidelobes = autocorrelation(code)[1:]
    outputs = np.abs(np.correlate(filter_taps(code), code.astype(np.float64), "full"))
    peak = outputs[code.size - 1]
    sir = float(pulse_compression.sir(code))
    return CodeFigures(
        sir=sir,
        sir_db=float(10 * np.log10(sir)),
        noise_loss_db=pulse_compression.noise_loss_db(code),
        filter_psl_db=float(20 * np.log10(np.delete(outputs, code.size - 1).max() / peak)),
        merit_factor=float(pulse_compression.merit_factor(code)),
        psl=int(np.abs(sidelobes).max()),
        isl=int(2 * (sidelobes**2).sum()),
    )


def filter_taps(code: np.ndarray) -> np.ndarray:
    """The mismatched filter x of largest SIR, float64 `[N]`, scaled to x.s = N, the matched filter's gain."""
    taps = pulse_compression.mismatched_filter(code)
    return taps * (code.size / (taps @ code))


def to_hex(code: np.ndarray) -> str:
    """Hexadecimal digits of a code `[N]`, first chip in the highest bit, + as 1, zeros before it to a whole digit."""
    number = int("".join("1" if chip > 0 else "0" for chip in np.asarray(code).tolist()), 2)
    return f"{number:0{-(-len(code) // 4)}X}"


def from_hex(text: str, length: int) -> np.ndarray:
    """The code int8 `[N]` of `to_hex`.

    Raises:
        ValueError: if the text is no hexadecimal number of at most `length` bits.
    """
    number = int(text, 16)
    if number >> length:
        raise ValueError(f"{text} has more than the {length} bits of the code.")
    return np.array([1 if number >> (length - 1 - i) & 1 else -1 for i in range(length)], np.int8)
