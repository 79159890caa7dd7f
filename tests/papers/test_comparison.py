"""Verdicts follow from errors, tolerances and bounds."""

import pytest

from papers.comparison import NOT_REPRODUCED, ORDER_ONLY, REPRODUCED, at_least, at_most, compare, compare_points


def test_verdicts() -> None:
    assert compare("x", 2.0, 2.1, 0.05).verdict == REPRODUCED
    assert compare("x", 2.0, 2.2, 0.05).verdict == NOT_REPRODUCED
    assert compare("x", 2.0, 2.2, 0.05, same_order=True).verdict == ORDER_ONLY
    assert compare_points("x", 0.16, 0.20, 0.05).error == pytest.approx(0.04)
    assert at_most("x", 30, 20).verdict == at_least("x", 30, 40).verdict == REPRODUCED
    assert at_most("x", 30, 40).verdict == at_least("x", 30, 20).verdict == NOT_REPRODUCED
