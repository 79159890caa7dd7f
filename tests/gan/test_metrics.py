"""Novelty: splits leak no class, and replaying the training set or its orbit is worth nothing."""

import numpy as np
import pytest

from gan import metrics
from gan.problems import problem
from gan.sequences.codes import all_codes

PAIR = problem("ob_zcp", 7)


@pytest.fixture(scope="module")
def optimal() -> np.ndarray:
    codes = all_codes(14)
    return codes[np.asarray(PAIR.score(codes)) == 0]


@pytest.fixture(scope="module")
def split(optimal: np.ndarray) -> metrics.Split:
    return metrics.split_by_class(PAIR, optimal, seed=0)


def test_a_split_by_class_leaks_nothing(optimal: np.ndarray, split: metrics.Split) -> None:
    assert len(optimal) == 192
    assert len(split.train_classes) == len(split.held_out_classes) == 2
    assert not split.train_classes & split.held_out_classes
    assert set(PAIR.class_ids(split.train)) == split.train_classes
    orbit = np.concatenate([PAIR.orbit(code) for code in split.train])
    assert not set(PAIR.class_ids(orbit)) & split.held_out_classes


def test_a_replayer_of_the_training_orbit_scores_zero(split: metrics.Split) -> None:
    half = split.train[::2]
    seen = metrics.Split(PAIR, half, split.train_classes, split.held_out_classes)
    replay = np.concatenate([PAIR.orbit(code) for code in half])
    worth = metrics.novelty(seen, replay)
    assert worth.valid == worth.samples
    assert worth.novel > 0  # other members of the same classes are new codes, but nothing new
    assert (worth.novel_classes, worth.held_out_recall) == (0, 0.0)
    assert metrics.novelty(seen, half).novel == 0


def test_everything_recalls_everything_once(optimal: np.ndarray, split: metrics.Split) -> None:
    worth = metrics.novelty(split, np.concatenate([optimal, optimal, -optimal[:5], all_codes(14)[:100]]))
    assert worth.distinct == len(optimal)
    assert worth.novel == len(optimal) - len(split.train)
    assert (worth.novel_classes, worth.held_out_recall) == (2, 1.0)


def test_a_split_needs_two_classes(optimal: np.ndarray) -> None:
    with pytest.raises(ValueError, match="leaves one side"):
        metrics.split_by_class(PAIR, PAIR.orbit(optimal[0]), seed=0)


def test_samples_without_a_hit_are_worth_nothing() -> None:
    mocss = problem("mocss", 4)
    codes = all_codes(16)
    split = metrics.split_by_class(mocss, codes[np.asarray(mocss.score(codes)) == 0], seed=0)
    worth = metrics.novelty(split, np.ones((3, 16), np.int8))
    assert (worth.samples, worth.valid, worth.distinct, worth.novel, worth.held_out_recall) == (3, 0, 0, 0, 0.0)
