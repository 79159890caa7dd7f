"""The folded problem: skew-symmetric codes searched by their free chips, reported as the codes that they are."""

import json

import numpy as np
import pytest

from gan import catalogue, surrogate
from gan.problems import problem
from gan.surrogate import SurrogateSettings


@pytest.mark.parametrize("length", [5, 13, 59])
def test_unfolded_codes_are_skew_symmetric_and_score_alike(length: int, rng: np.random.Generator) -> None:
    folded, plain = problem("mmf_skew", length), problem("mmf", length)
    codes = folded.random(rng, 50)
    full = folded.unfold(codes)
    middle = length // 2
    for i in range(middle + 1):
        np.testing.assert_array_equal(full[:, middle + i], (-1) ** i * full[:, middle - i])
    np.testing.assert_allclose(folded.score(codes), plain.score(full), rtol=1e-4)
    assert folded.exact(codes[0]) == plain.exact(full[0])
    assert folded.class_ids(codes) == plain.class_ids(full)
    np.testing.assert_array_equal(folded.from_text(folded.to_text(codes[0])), codes[0])


def test_flips_and_symmetries_of_free_chips(rng: np.random.Generator) -> None:
    folded = problem("mmf_skew", 31)
    code = folded.random(rng, 1)
    flipped = code * (1 - 2 * np.eye(16, dtype=np.int8))
    np.testing.assert_allclose(np.asarray(folded.score_flips(code))[0], folded.score(flipped), rtol=1e-5)
    assert len(set(folded.class_ids(folded.orbit(code[0])))) == 1
    assert folded.class_id(folded.gauge(code)[0]) == folded.class_id(code[0])


def test_impossible_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="odd length"):
        problem("mmf_skew", 60)
    with pytest.raises(ValueError, match="is not skew-symmetric"):
        problem("mmf_skew", 5).from_text(["+++++"])


def test_the_skew_optimum_is_found_and_catalogued_as_a_code_of_mmf() -> None:
    folded = problem("mmf_skew", 33)
    config = SurrogateSettings(elites=40, children=20, screening=8)
    result = surrogate.run(folded, 20_000, seed=0, stop_at=folded.target, settings=config)
    assert result.best == pytest.approx(38.647, abs=1e-3)  # by exhaustion of all skew-symmetric codes
    line = json.dumps(result.entries[0].to_json())
    entry = catalogue.check(line)
    assert entry.problem == problem("mmf", 33)
    assert len(entry.code) == 33
