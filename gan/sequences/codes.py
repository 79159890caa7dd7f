"""Codes as arrays of +1 and -1, as text and as packed words."""

from collections.abc import Sequence

import numpy as np


def to_text(code: np.ndarray) -> str:
    """`+-` text of one sequence `[N]`, first chip left."""
    return "".join("+" if chip > 0 else "-" for chip in np.asarray(code).tolist())


def from_text(text: str) -> np.ndarray:
    """int8 `[N]` of `+-` text.

    Raises:
        ValueError: if the text is empty or holds anything but `+` and `-`.
    """
    if not text or (wrong := sorted(set(text) - {"+", "-"})):
        found = f"holds {wrong[0]!r}" if text else "is empty"
        raise ValueError(f"sequence {text[:40]!r} {found}; write one `+` or `-` per chip, first chip left.")
    return np.where(np.frombuffer(text.encode(), np.uint8) == ord("+"), 1, -1).astype(np.int8)


def random_codes(rng: np.random.Generator, count: int, chips: int) -> np.ndarray:
    """Uniform random codes, int8 `[count, chips]`."""
    bits = np.unpackbits(rng.integers(0, 256, (count, -(-chips // 8)), dtype=np.uint8), axis=1, count=chips)
    return 1 - 2 * bits.astype(np.int8)


def all_codes(chips: int, first: int = 0, count: int | None = None) -> np.ndarray:
    """Codes number `first`, `first + 1`, ... of all `2**chips`, in the order of `pack`; int8 `[count, chips]`."""
    numbers = np.arange(first, 2**chips if count is None else first + count, dtype=np.int64)
    shifts = np.arange(chips - 1, -1, -1, dtype=np.int64)
    return (1 - 2 * ((numbers[:, None] >> shifts) & 1)).astype(np.int8)


def pack(codes: np.ndarray) -> np.ndarray:
    """uint64 `[..., ceil(chips / 64)]` of codes `[..., chips]`; words compare as codes do chip by chip, + before -."""
    chips = codes.shape[-1]
    bits = np.zeros((*codes.shape[:-1], -(-chips // 64) * 64), np.bool_)
    bits[..., :chips] = codes < 0
    return np.packbits(bits, axis=-1).view(">u8").astype(np.uint64)


def unpack(words: np.ndarray, chips: int) -> np.ndarray:
    """The codes int8 `[..., chips]` of packed words `[..., ceil(chips / 64)]`."""
    bits = np.unpackbits(words.astype(">u8").view(np.uint8), axis=-1, count=chips)
    return 1 - 2 * bits.astype(np.int8)


def hash_codes(codes: np.ndarray) -> np.ndarray:
    """Nonzero 64-bit hash of each code, uint64 `[B]` of `[B, chips]`.

    Exact up to 63 chips but for the fold of 0 into 1; above, 10^7 codes collide with probability 3e-6.
    """
    mixed = np.zeros(codes.shape[0], np.uint64)
    for word in np.moveaxis(pack(codes), -1, 0):
        mixed ^= word
        # The finaliser of splitmix64, a bijection of 64-bit words.
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return np.maximum(mixed, np.uint64(1))


def less(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether packed code a precedes packed code b, bool `[B]` of two `[B, words]`."""
    result = np.zeros(a.shape[0], np.bool_)
    for word in range(a.shape[1] - 1, -1, -1):
        result = (a[:, word] < b[:, word]) | ((a[:, word] == b[:, word]) & result)
    return result


def stack_text(texts: Sequence[str]) -> np.ndarray:
    """int8 `[sequences, N]` of `+-` texts.

    Raises:
        ValueError: if a text is malformed or they differ in length.
    """
    rows = [from_text(text) for text in texts]
    if len({row.size for row in rows}) != 1:
        raise ValueError(f"sequences have lengths {[row.size for row in rows]}; they must have one length.")
    return np.stack(rows)
