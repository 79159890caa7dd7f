"""The folded pairs: no optimal pair is lost, and free chips score, flip and map as the pairs that they stand for."""

import json

import numpy as np
import pytest

from gan import baselines, catalogue, surrogate
from gan.problems import problem
from gan.sequences import exhaustive
from gan.surrogate import SurrogateSettings

kinds = pytest.mark.parametrize("kind", [1, 2])


@kinds
@pytest.mark.parametrize("length", [3, 5, 9, 13])
def test_every_optimal_pair_is_folded(kind: int, length: int) -> None:
    folded = problem("ob_zcp_folded", length, kind=kind)
    pairs = exhaustive.optimal_pairs(length, kind).reshape(-1, 2 * length)
    np.testing.assert_array_equal(folded.unfold(pairs[:, : folded.chips]), pairs)


@kinds
def test_free_chips_score_and_flip_as_pairs(kind: int, rng: np.random.Generator) -> None:
    folded, whole = problem("ob_zcp_folded", 11, kind=kind), problem("ob_zcp", 11, kind=kind)
    codes = folded.random(rng, 7)
    pairs = folded.unfold(codes)
    np.testing.assert_array_equal(folded.score(codes), whole.score(pairs))
    assert folded.exact(codes[0]) == whole.exact(pairs[0])
    flipped = codes[:, None] * (1 - 2 * np.eye(folded.chips, dtype=np.int8))
    scores = folded.score(flipped.reshape(-1, folded.chips)).reshape(codes.shape)
    np.testing.assert_array_equal(folded.score_flips(codes), scores)


@kinds
def test_symmetries_are_those_of_the_pairs(kind: int, rng: np.random.Generator) -> None:
    folded, whole = problem("ob_zcp_folded", 9, kind=kind), problem("ob_zcp", 9, kind=kind)
    codes = folded.random(rng, 20)
    pairs = folded.unfold(codes)
    assert folded.class_ids(codes) == whole.class_ids(pairs)
    np.testing.assert_array_equal(folded.unfold(folded.canonical(codes)), whole.canonical(pairs))
    np.testing.assert_array_equal(folded.unfold(folded.gauge(codes)), whole.gauge(pairs))
    np.testing.assert_array_equal(folded.unfold(folded.orbit(codes[0])), whole.orbit(pairs[0]))
    element = rng.integers(0, folded.group.order, len(codes))
    np.testing.assert_array_equal(folded.unfold(folded.image(codes, element)), whole.image(pairs, element))
    np.testing.assert_array_equal(folded.from_text(folded.to_text(codes[0])), codes[0])


def test_other_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match="mirrored signs"):
        problem("ob_zcp_folded", 5).from_text(["+++++", "+++++"])


def test_searches_find_pairs_and_catalogue_them_as_such() -> None:
    folded = problem("ob_zcp_folded", 11)
    ours = surrogate.run(folded, 3000, seed=0, settings=SurrogateSettings(elites=40, children=20, screening=8))
    for result in (ours, *(method(folded, 50_000, 0) for method in baselines.METHODS.values())):
        assert result.best == 0
        entry = catalogue.check(json.dumps(result.entries[0].to_json()))
        assert entry.problem == problem("ob_zcp", 11)
        assert entry.class_id == result.entries[0].class_id
