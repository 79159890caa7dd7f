"""Whether ours beats theirs over several seeds: paired differences with their 95 % confidence."""

import numpy as np

from papers.comparison import Comparison

# Two-sided 95 % quantiles of Student's t by degrees of freedom.
_STUDENT = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def difference(theirs: list[float], ours: list[float]) -> tuple[float, float]:
    """Returns the mean of ours - theirs, pair by pair, and half the width of its 95 % confidence interval."""
    gains = np.subtract(ours, theirs)
    freedom = len(gains) - 1
    return float(np.mean(gains)), _STUDENT[freedom] * float(np.std(gains, ddof=1)) / len(gains) ** 0.5


def verdict(mean: float, half: float) -> str:
    """Says who wins, from a difference and the half width of its confidence interval."""
    return "wins" if mean > half else "loses" if mean < -half else "no difference"


def gain(item: str, theirs: list[float], ours: list[float], note: str) -> Comparison:
    """Returns a row that says by how much ours is larger; `note` says what theirs is."""
    mean, half = difference(theirs, ours)
    before, after = float(np.mean(theirs)), float(np.mean(ours))
    note = f"{note}; difference {mean:+.3f} +- {half:.3f} over {len(ours)} seeds"
    return Comparison(
        item=item, paper=before, ours=after, error=after / before - 1, verdict=verdict(mean, half), note=note
    )
