"""Classical constructions: Legendre sequences, m-sequences, Barker-13."""

import numpy as np

from gan.sequences.codes import from_text

BARKER_13 = from_text("+++++--++-+-+")


def legendre(length: int, at_zero: int = 1) -> np.ndarray:
    """The Legendre sequence of an odd prime length, int8 `[N]`: +1 at quadratic residues, `at_zero` at index 0.

    Raises:
        ValueError: if the length is not an odd prime.
    """
    if length < 3 or any(length % factor == 0 for factor in range(2, int(length**0.5) + 1)):
        raise ValueError(f"`length` is {length}; a Legendre sequence needs an odd prime length.")
    code = np.full(length, -1, np.int8)
    code[np.arange(1, length) ** 2 % length] = 1
    code[0] = at_zero
    return code


def legendre_rotations(length: int) -> np.ndarray:
    """Every rotation of the Legendre sequence with either sign at index 0, int8 `[2N, N]`."""
    both = [legendre(length, at_zero) for at_zero in (1, -1)]
    return np.stack([np.roll(code, -shift) for code in both for shift in range(length)])


# Feedback taps of one primitive polynomial per degree: x^degree + sum of x^tap + 1.
_TAPS = {2: (1,), 3: (1,), 4: (1,), 5: (2,), 6: (1,), 7: (1,), 8: (4, 3, 2), 9: (4,), 10: (3,)}


def m_sequence(degree: int) -> np.ndarray:
    """A maximal-length shift-register sequence, int8 `[2**degree - 1]`.

    Raises:
        ValueError: if no primitive polynomial of this degree is known here.
    """
    if degree not in _TAPS:
        raise ValueError(f"`degree` is {degree}; it must be one of {', '.join(map(str, _TAPS))}.")
    bits = [1] * degree
    for i in range(2**degree - 1 - degree):
        bits.append(bits[i] ^ (sum(bits[i + tap] for tap in _TAPS[degree]) & 1))
    return (1 - 2 * np.array(bits)).astype(np.int8)
