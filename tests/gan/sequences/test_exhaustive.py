"""Exhaustion against brute force and against published counts."""

import numpy as np
import pytest

from gan.problems import problem
from gan.sequences import exhaustive
from gan.sequences.codes import all_codes
from gan.sequences.complementary import is_golay, is_z_optimal, mocss_residual, ob_zcp_residual

# Length, then (optimal ordered pairs, their classes, ordered Z-optimal pairs) of types I and II.
PAIRS = {
    5: ((96, 2, 96), (160, 3, 192)),
    7: ((192, 4, 192), (544, 9, 1_152)),
    9: ((864, 14, 928), (1_760, 28, 5_632)),
    11: ((704, 11, 1_024), (2_432, 38, 28_672)),
    13: ((1_408, 22, 3_296), (5_632, 88, 131_072)),
    15: ((1_024, 16, 4_224), (11_200, 175, 587_776)),
    17: ((5_056, 79, 11_200), (22_592, 353, 2_534_912)),
}


@pytest.mark.parametrize("kind", [1, 2])
@pytest.mark.parametrize("length", [5, 7, 9, 11, 13, 15, pytest.param(17, marks=pytest.mark.slow)])
def test_counts_of_z_complementary_pairs(length: int, kind: int) -> None:
    optimal, classes, z_optimal = PAIRS[length][kind - 1]
    pairs = exhaustive.optimal_pairs(length, kind)
    assert len(np.unique(pairs.reshape(len(pairs), -1), axis=0)) == len(pairs) == optimal
    assert (ob_zcp_residual(pairs, kind) == 0).all()
    assert len(set(problem("ob_zcp", length, kind=kind).class_ids(pairs.reshape(len(pairs), -1)))) == classes
    assert exhaustive.count_z_optimal_pairs(length, kind) == z_optimal


@pytest.mark.parametrize("kind", [1, 2])
def test_pairs_are_those_of_brute_force(kind: int) -> None:
    every = all_codes(14).reshape(-1, 2, 7)
    expected = {pair.tobytes() for pair in every[ob_zcp_residual(every, kind) == 0]}
    assert {pair.tobytes() for pair in exhaustive.optimal_pairs(7, kind)} == expected
    assert exhaustive.count_z_optimal_pairs(7, kind) == int(is_z_optimal(every, kind).sum())


def test_sets_are_those_of_brute_force() -> None:
    every = all_codes(12).reshape(-1, 2, 2, 3)
    assert len(exhaustive.mocss(2, 2, 3)) == int((mocss_residual(every) == 0).sum()) == 0
    every = all_codes(16).reshape(-1, 2, 2, 4)
    expected = {code.tobytes() for code in every[mocss_residual(every) == 0]}
    assert {code.tobytes() for code in exhaustive.mocss(2, 2, 4)} == expected


@pytest.mark.parametrize(("length", "count"), [(2, 8), (4, 32), (8, 192), (10, 128), (16, 1_536), (12, 0)])
def test_counts_of_golay_pairs(length: int, count: int) -> None:
    pairs = exhaustive.complementary_sets(2, length)
    assert len(pairs) == count
    assert is_golay(pairs).all()


@pytest.mark.parametrize(
    ("flocks", "sequences", "length", "count"),
    [
        (2, 2, 2, 16),
        (2, 2, 4, 64),
        (2, 2, 8, 384),
        (2, 2, 10, 256),
        (2, 2, 16, 3_072),
        (1, 4, 2, 96),
        (4, 4, 2, 9_216),
        (4, 4, 3, 36_864),
        (1, 4, 4, 1_920),
        (2, 4, 4, 36_096),
        (3, 4, 4, 165_888),
        pytest.param(4, 4, 4, 331_776, marks=pytest.mark.slow),
    ],
)
def test_counts_of_orthogonal_sets(flocks: int, sequences: int, length: int, count: int) -> None:
    sets = exhaustive.mocss(flocks, sequences, length)
    assert sets.shape == (count, flocks, sequences, length)
    assert (mocss_residual(sets) == 0).all()


def test_the_sets_of_length_8_fall_into_12_classes_of_32() -> None:
    """As AlphaSeq counts them (arXiv:1810.01218)."""
    mocss = problem("mocss", 8)
    codes = exhaustive.mocss(2, 2, 8).reshape(-1, 32)
    _, sizes = np.unique(mocss.class_ids(codes), return_counts=True)
    assert sizes.tolist() == [32] * 12
