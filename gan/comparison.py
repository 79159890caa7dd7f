"""Searches beside each other at equal budget: marks on the way, medians over seeds, curves for a plot."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from gan.ledger import SearchResult
from gan.problems import Problem


@dataclasses.dataclass(frozen=True)
class Mark:
    """A score that a search is measured against."""

    name: str
    score: float


def marks(problem: Problem) -> tuple[Mark, ...]:
    """The scores worth reaching, ascending.

    Pulse compression at N = 59, the length of AlphaSeq (arXiv:1810.01218): the best Legendre rotation, AlphaSeq's code,
    four times Legendre (HpGAN's claim, arXiv:2012.05645) and the best known value. Elsewhere the target, if there is
    one.
    """
    if problem.name == "mmf" and problem.length == 59:
        return (
            Mark("Legendre", 10.984),
            Mark("AlphaSeq", 33.453),
            Mark("4x Legendre", 43.936),
            Mark("best known", 50.8427),
        )
    return (Mark("best known" if problem.name == "mmf" else "found", problem.target),) * bool(
        np.isfinite(problem.target)
    )


def totals(results: Sequence[SearchResult]) -> dict[str, Any]:
    """By method: evaluations to every mark, best score, hits and classes, each as median and range over seeds."""
    return {method: _method_totals(of_method) for method, of_method in _by_method(results).items()}


def _method_totals(results: Sequence[SearchResult]) -> dict[str, Any]:
    problem = results[0].problem
    hits = [[entry for entry in result.entries if problem.is_hit(entry.value)] for result in results]
    return {
        "seeds": len(results),
        "evaluations_to": {
            mark.name: {"score": mark.score} | _reached([result.evaluations_to(mark.score) for result in results])
            for mark in marks(problem)
        },
        "best": _spread([result.best for result in results]),
        "hits": _spread([len(entries) for entries in hits]),
        "classes": _spread([len({entry.class_id for entry in entries}) for entries in hits]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _reached(evaluations: Sequence[int | None]) -> dict[str, Any]:
    """Median and range over seeds; a seed that did not arrive counts as infinite, and what is infinite is None."""
    arrived = sorted(count for count in evaluations if count is not None)
    padded = [float(count) for count in arrived] + [np.inf] * (len(evaluations) - len(arrived))
    median = statistics.median(padded)
    return {
        "reached": len(arrived),
        "median": median if np.isfinite(median) else None,
        "min": arrived[0] if arrived else None,
        "max": arrived[-1] if len(arrived) == len(evaluations) else None,
    }


def median_curves(results: Sequence[SearchResult], points: int = 200) -> dict[str, list[tuple[float, float]]]:
    """By method: (evaluations, median over seeds of the best score so far), evaluations spaced by equal ratios.

    A curve begins when every seed has a score. A seed that stopped early keeps its best.
    """
    curves = {}
    for method, of_method in _by_method(results).items():
        first = max(result.curve[0][0] for result in of_method)
        last = max(result.evaluations for result in of_method)
        grid = np.unique(np.geomspace(first, max(first, last), points).astype(np.int64))
        best = np.median([_at(result.curve, grid) for result in of_method], axis=0)
        curves[method] = list(zip(grid.tolist(), best.tolist(), strict=True))
    return curves


def class_curves(results: Sequence[SearchResult]) -> dict[str, list[tuple[float, float]]]:
    """By method: (evaluations, distinct classes of hits of all seeds together), one point per new class."""
    curves = {}
    for method, of_method in _by_method(results).items():
        problem = of_method[0].problem
        first_seen: dict[str, int] = {}
        for entry in sorted((entry for result in of_method for entry in result.entries), key=lambda e: e.evaluation):
            if problem.is_hit(entry.value):
                first_seen.setdefault(entry.class_id, entry.evaluation)
        if first_seen:
            curves[method] = [(float(at), float(n)) for n, at in enumerate(sorted(first_seen.values()), start=1)]
    return curves


def _at(curve: Sequence[tuple[int, float]], grid: np.ndarray) -> np.ndarray:
    evaluations, best = np.array(curve, np.float64).T
    return best[np.searchsorted(evaluations, grid, side="right") - 1]


def _by_method(results: Sequence[SearchResult]) -> dict[str, list[SearchResult]]:
    groups: dict[str, list[SearchResult]] = defaultdict(list)
    for result in results:
        groups[result.method].append(result)
    return groups
