"""`Comparison`: one number of a paper beside ours, and whether that counts as reproduced."""

import dataclasses
from collections.abc import Mapping
from typing import Any

REPRODUCED, ORDER_ONLY, NOT_REPRODUCED, BLOCKED = "reproduced", "order only", "not reproduced", "blocked"
# Not a claim of the paper: a claim with one of its assumptions changed.
WHAT_IF = "what if"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """One row of a paper's table in `result.json`.

    Attributes:
        item: what is compared, with its unit.
        paper: the paper's number, or its claim in words.
        ours: our number; `None` where it cannot be computed.
        error: relative, or in points where the note says so; negative when ours is smaller. `None` where there is none.
        tolerance: the largest `error` that counts as reproduced, or the rule in words.
        verdict: `REPRODUCED`, `ORDER_ONLY`, `NOT_REPRODUCED`, `BLOCKED`, `WHAT_IF` or one of `papers.confidence`.
        note: where the paper says it, and under which conditions ours holds.
    """

    item: str
    paper: float | str
    ours: float | str | None
    error: float | None = None
    tolerance: float | str | None = None
    verdict: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """What a table or figure gives: comparisons, and the curves behind them (`series`, `x`, `y` and their names)."""

    title: str
    comparisons: tuple[Comparison, ...]
    curves: tuple[Mapping[str, Any], ...] = ()


def compare(
    item: str, paper: float, ours: float, tolerance: float, *, note: str = "", same_order: bool = False
) -> Comparison:
    """Allows a relative error of `tolerance`; a larger one is "order only" where `same_order`.

    `same_order` says that ours is on the same side of a rival as the paper's number.
    """
    return _judge(item, paper, ours, ours / paper - 1, tolerance, note, same_order)


def compare_points(
    item: str, paper: float, ours: float, tolerance: float, *, note: str = "", same_order: bool = False
) -> Comparison:
    """Allows an absolute error of `tolerance`, for shares: 0.05 is five percentage points. Otherwise as `compare`."""
    return _judge(item, paper, ours, ours - paper, tolerance, f"points; {note}" if note else "points", same_order)


def at_most(item: str, limit: float, ours: float, note: str = "") -> Comparison:
    """Counts as reproduced where `ours` stays within the paper's upper bound."""
    return _judge(item, limit, ours, max(ours / limit - 1, 0.0), 0.0, f"at most; {note}" if note else "at most", False)


def at_least(item: str, limit: float, ours: float, note: str = "") -> Comparison:
    """Counts as reproduced where `ours` reaches the paper's lower bound."""
    return _judge(
        item, limit, ours, min(ours / limit - 1, 0.0), 0.0, f"at least; {note}" if note else "at least", False
    )


def statement(item: str, holds: bool, note: str) -> Comparison:
    """Returns a claim in words: "yes" in the paper, yes or no with us."""
    verdict = REPRODUCED if holds else NOT_REPRODUCED
    return Comparison(item=item, paper="yes", ours="yes" if holds else "no", verdict=verdict, note=note)


def blocked(item: str, paper: float | str, note: str) -> Comparison:
    """Returns a row that cannot be computed here, and why."""
    return Comparison(item=item, paper=paper, ours=None, verdict=BLOCKED, note=note)


def _judge(
    item: str, paper: float, ours: float, error: float, tolerance: float, note: str, same_order: bool
) -> Comparison:
    # A bound met exactly, up to rounding, is met.
    verdict = REPRODUCED if abs(error) <= tolerance + 1e-12 else ORDER_ONLY if same_order else NOT_REPRODUCED
    return Comparison(item=item, paper=paper, ours=ours, error=error, tolerance=tolerance, verdict=verdict, note=note)
