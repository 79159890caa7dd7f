"""Every optimal odd-length Z-complementary pair, complementary set and MOCSS of a small length: the ground truth.

What must vanish is linear in the autocorrelations of the sequences. So half of the sequences is listed with a linear
hash of these, and each is met with those whose hash is its negative: 2^(ML/2) work for sets of M sequences, not 2^(ML).
"""

from collections.abc import Iterator

import numpy as np

from gan.sequences.codes import all_codes
from gan.sequences.complementary import in_zone, ob_zcp_residual
from gan.sequences.correlation import autocorrelation

_CHUNK = 1 << 18  # candidates in memory at once


def optimal_pairs(length: int, kind: int) -> np.ndarray:
    """All optimal OB-ZCPs of type `kind`, ordered, int8 `[P, 2, N]`.

    Raises:
        ValueError: if there is no such pair: the length is even or below 3, or the kind is not 1 or 2.
    """
    zone = in_zone(length, kind)
    sequences = all_codes(length)
    vanishing = autocorrelation(sequences)[:, zone]
    candidates = (sequences[np.stack(indices, 1)] for indices in _meetings(vanishing, vanishing))
    return np.concatenate([pairs[ob_zcp_residual(pairs, kind) == 0] for pairs in candidates])


def count_z_optimal_pairs(length: int, kind: int) -> int:
    """Ordered pairs whose zone is as wide as it can be, whatever stands outside it; `ValueError` as above."""
    vanishing = autocorrelation(all_codes(length))[:, in_zone(length, kind)]
    return sum(len(first) for first, _ in _meetings(vanishing, vanishing))


def complementary_sets(sequences: int, length: int) -> np.ndarray:
    """All sets of M sequences whose autocorrelations sum to zero at every lag but 0, ordered, int8 `[P, M, N]`."""
    halves = []
    for count in (sequences // 2, sequences - sequences // 2):
        half = all_codes(count * length).reshape(-1, count, length)
        halves.append((half, autocorrelation(half).sum(1)[:, 1:]))
    (left, left_sums), (right, right_sums) = halves
    meetings = _meetings(left_sums, right_sums)
    return np.concatenate([np.concatenate([left[first], right[second]], 1) for first, second in meetings])


def mocss(flocks: int, sequences: int, length: int) -> np.ndarray:
    """All (K,M,N)-MOCSS, ordered, int8 `[P, K, M, N]`; complete complementary codes when K = M."""
    sets = complementary_sets(sequences, length)
    orthogonal = _orthogonal(sets)
    members = np.arange(len(sets))[:, None]
    for _ in range(flocks - 1):
        members = np.concatenate(list(_extended(members, orthogonal)))
    return sets[members]


def _extended(members: np.ndarray, orthogonal: np.ndarray) -> Iterator[np.ndarray]:
    """Each row of `members` `[P, k]` followed by a set that is orthogonal to all in it, rows `[..., k+1]` in chunks."""
    step = 1 + 16 * _CHUNK // max(1, len(orthogonal))
    for start in range(0, max(1, len(members)), step):
        part = members[start : start + step]
        rows, added = np.nonzero(orthogonal[part].all(1))
        yield np.concatenate([part[rows], added[:, None]], 1)


def _orthogonal(sets: np.ndarray) -> np.ndarray:
    """Whether the cross-correlation sums of two sets vanish at every lag, bool `[P, P]` of `[P, M, N]`."""
    count, length = len(sets), sets.shape[-1]
    flat = sets.reshape(count, sets.shape[1] * length).astype(np.float32)  # sums of at most M N signs: exact
    result = np.ones((count, count), np.bool_)
    for lag in range(length):
        shifted = np.zeros(sets.shape, np.float32)
        shifted[..., : length - lag] = sets[..., lag:]
        zero = flat @ shifted.reshape(flat.shape).T == 0
        result &= zero & zero.T
    return result


def _meetings(left: np.ndarray, right: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Chunks of indices (i, j) with left[i] + right[j] = 0, of integer vectors `[P, n]` and `[Q, n]`."""
    weights = np.random.default_rng(0).integers(-(2**62), 2**62, left.shape[1])
    wanted, hashes = -(left @ weights), right @ weights  # modulo 2^64: still linear
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    first = np.searchsorted(hashes, wanted)
    counts = np.searchsorted(hashes, wanted, side="right") - first
    ends = np.cumsum(counts)
    start = 0
    while start < len(left):
        stop = max(start + 1, int(np.searchsorted(ends, ends[start] - counts[start] + _CHUNK, side="right")))
        part = counts[start:stop]
        i = np.repeat(np.arange(start, stop), part)
        j = order[first[i] + np.arange(len(i)) - np.repeat(np.cumsum(part) - part, part)]
        true = (left[i] + right[j] == 0).all(1)
        yield i[true], j[true]
        start = stop
