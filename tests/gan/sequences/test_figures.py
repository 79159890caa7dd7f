"""A designer's figures against published codes, and text forms that come back."""

import numpy as np
import pytest

from gan.paper import ALPHASEQ_CODE
from gan.sequences.codes import from_text
from gan.sequences.families import BARKER_13
from gan.sequences.figures import code_figures, filter_taps, from_hex, to_hex


def test_barker_13_and_alphaseq_have_their_published_figures() -> None:
    barker = code_figures(BARKER_13)
    assert (barker.psl, barker.isl) == (1, 12)
    assert barker.merit_factor == pytest.approx(169 / 12)
    assert barker.sir == pytest.approx(37)
    alphaseq = code_figures(from_text(ALPHASEQ_CODE))
    assert alphaseq.sir == pytest.approx(33.453, abs=1e-3)
    assert alphaseq.noise_loss_db == pytest.approx(2.43, abs=5e-3)
    assert alphaseq.merit_factor == pytest.approx(1.2677, abs=1e-4)


def test_taps_have_the_gain_of_the_matched_filter_and_the_sir(rng: np.random.Generator) -> None:
    code = from_text(ALPHASEQ_CODE)
    taps = filter_taps(code)
    assert taps @ code == pytest.approx(59)
    outputs = np.correlate(taps, code.astype(float), "full")
    sidelobes = np.delete(outputs, 58)
    assert 59**2 / (sidelobes**2).sum() == pytest.approx(code_figures(code).sir)
    assert 20 * np.log10(np.abs(sidelobes).max() / 59) == pytest.approx(code_figures(code).filter_psl_db)


def test_hexadecimal_text_comes_back(rng: np.random.Generator) -> None:
    for length in (1, 4, 59, 127):
        code = rng.choice(np.array([-1, 1], np.int8), length)
        np.testing.assert_array_equal(from_hex(to_hex(code), length), code)
    assert to_hex(BARKER_13) == "1F35"
    with pytest.raises(ValueError, match="more than the 12 bits"):
        from_hex("1F35", 12)
