"""`Comparison`: one number of a paper beside ours, and whether that counts as reproduced."""

import dataclasses
from collections.abc import Mapping
from typing import Any

REPRODUCED, ORDER_ONLY, NOT_REPRODUCED, BLOCKED = "reproduced", "order only", "not reproduced", "blocked"
# Not a claim of the paper: a claim with one of its assumptions changed.
WHAT_IF = "what if"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A row of `result.json`; `error` and `tolerance` are relative unless the note says points."""

    item: str
    paper: float | str
    ours: float | str | None
    error: float | None
    tolerance: float | None
    verdict: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class PaperTable:
    """What a table or figure gives: comparisons, and the curves behind them (`series`, `x`, `y` and their names)."""

    title: str
    comparisons: tuple[Comparison, ...]
    curves: tuple[Mapping[str, Any], ...] = ()


def compare(item: str, paper: float, ours: float, tolerance: float, note: str = "", order: bool = False) -> Comparison:
    """Within a relative tolerance of the paper's number; else "order only" where the paper's direction holds."""
    return _judge(item, paper, ours, ours / paper - 1, tolerance, note, order)


def compare_points(
    item: str, paper: float, ours: float, tolerance: float, note: str = "", order: bool = False
) -> Comparison:
    """Within an absolute tolerance, for shares: 0.05 is five percentage points."""
    return _judge(item, paper, ours, ours - paper, tolerance, f"points; {note}" if note else "points", order)


def at_most(item: str, limit: float, ours: float, note: str = "") -> Comparison:
    """The paper says that it stays below `limit`."""
    return _judge(item, limit, ours, max(ours / limit - 1, 0.0), 0.0, f"at most; {note}" if note else "at most", False)


def at_least(item: str, limit: float, ours: float, note: str = "") -> Comparison:
    """The paper says that it reaches `limit`."""
    return _judge(
        item, limit, ours, min(ours / limit - 1, 0.0), 0.0, f"at least; {note}" if note else "at least", False
    )


def statement(item: str, holds: bool, note: str) -> Comparison:
    """A claim in words: "yes" in the paper, yes or no with us."""
    return Comparison(item, "yes", "yes" if holds else "no", None, None, REPRODUCED if holds else NOT_REPRODUCED, note)


def blocked(item: str, paper: float | str, note: str) -> Comparison:
    """What cannot be computed here, and why."""
    return Comparison(item, paper, None, None, None, BLOCKED, note)


def _judge(item: str, paper: float, ours: float, error: float, tolerance: float, note: str, order: bool) -> Comparison:
    # A bound met exactly, up to rounding, is met.
    verdict = REPRODUCED if abs(error) <= tolerance + 1e-12 else ORDER_ONLY if order else NOT_REPRODUCED
    return Comparison(item, paper, ours, error, tolerance, verdict, note)
