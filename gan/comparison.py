"""Searches beside each other at equal budget: marks on the way, medians over seeds, curves for a plot."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gan.ledger import Point, SearchResult
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


def _evaluations(result: SearchResult, score: float) -> int | None:
    return result.evaluations_to(score)


def _evaluations_at_chips(result: SearchResult, score: float) -> int | None:
    point = result.reached(score)
    return result.bill_at_chips(point) if point else None


def _cpu_s(result: SearchResult, score: float) -> float | None:
    point = result.reached(score)
    return point.cpu_s if point else None


CURRENCIES: dict[str, Callable[[SearchResult, float], float | None]] = {
    "evaluations": _evaluations,
    "evaluations_at_chips": _evaluations_at_chips,
    "cpu_s": _cpu_s,
}
"""What reaching a score has cost: evaluations, the same with every gradient billed at L, processor seconds."""


def totals(results: Sequence[SearchResult]) -> dict[str, Any]:
    """By method: the cost of every mark in every currency, best score, hits, classes; medians and ranges over seeds."""
    return {method: _method_totals(of_method) for method, of_method in _by_method(results).items()}


def _method_totals(results: Sequence[SearchResult]) -> dict[str, Any]:
    problem = results[0].problem
    hits = [[entry for entry in result.entries if entry.hit] for result in results]
    return {
        "seeds": len(results),
        **{
            f"{currency}_to": {
                mark.name: {"score": mark.score} | _reached([cost(result, mark.score) for result in results])
                for mark in marks(problem)
            }
            for currency, cost in CURRENCIES.items()
        },
        "evaluations": _spread([result.evaluations for result in results]),
        "cpu_s": _spread([result.curve[-1].cpu_s for result in results]),
        "best": _spread([result.best for result in results]),
        "hits": _spread([len(entries) for entries in hits]),
        "classes": _spread([len({entry.class_id for entry in entries}) for entries in hits]),
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _reached(costs: Sequence[float | None]) -> dict[str, Any]:
    """Median and range over seeds; a seed that did not arrive counts as infinite, and what is infinite is None."""
    arrived = sorted(cost for cost in costs if cost is not None)
    padded = [float(cost) for cost in arrived] + [np.inf] * (len(costs) - len(arrived))
    median = statistics.median(padded)
    return {
        "reached": len(arrived),
        "median": median if np.isfinite(median) else None,
        "min": arrived[0] if arrived else None,
        "max": arrived[-1] if len(arrived) == len(costs) else None,
    }


def median_curves(results: Sequence[SearchResult], points: int = 200) -> dict[str, list[tuple[float, float]]]:
    """By method: (evaluations, median over seeds of the best score so far), evaluations spaced by equal ratios.

    A curve begins when every seed has a score. A seed that stopped early keeps its best.
    """
    curves = {}
    for method, of_method in _by_method(results).items():
        grid = _grid(of_method, points)
        best = np.median([_at(result.curve, grid) for result in of_method], axis=0)
        curves[method] = list(zip(grid.tolist(), best.tolist(), strict=True))
    return curves


def best_ranges(results: Sequence[SearchResult], points: int = 200) -> dict[str, list[tuple[float, float, float]]]:
    """By method: (evaluations, least, largest best score so far over seeds), on the grid of `median_curves`."""
    ranges = {}
    for method, of_method in _by_method(results).items():
        grid = _grid(of_method, points)
        best = np.array([_at(result.curve, grid) for result in of_method])
        ranges[method] = list(zip(grid.tolist(), best.min(0).tolist(), best.max(0).tolist(), strict=True))
    return ranges


def _grid(results: Sequence[SearchResult], points: int) -> np.ndarray:
    """Evaluations spaced by equal ratios, from where every seed has a score to the last of all."""
    first = max(result.curve[0].evaluations for result in results)
    last = max(result.evaluations for result in results)
    return np.unique(np.geomspace(first, max(first, last), points).astype(np.int64))


def class_curves(results: Sequence[SearchResult]) -> dict[str, list[tuple[float, float]]]:
    """By method: (evaluations, distinct classes of hits of all seeds together), one point per new class."""
    curves = {}
    for method, of_method in _by_method(results).items():
        first_seen: dict[str, int] = {}
        for entry in sorted((entry for result in of_method for entry in result.entries), key=lambda e: e.evaluation):
            if entry.hit:
                first_seen.setdefault(entry.class_id, entry.evaluation)
        if first_seen:
            curves[method] = [(float(at), float(n)) for n, at in enumerate(sorted(first_seen.values()), start=1)]
    return curves


def _at(curve: Sequence[Point], grid: np.ndarray) -> np.ndarray:
    evaluations = np.array([point.evaluations for point in curve])
    best = np.array([point.best for point in curve])
    return best[np.searchsorted(evaluations, grid, side="right") - 1]


def _by_method(results: Sequence[SearchResult]) -> dict[str, list[SearchResult]]:
    groups: dict[str, list[SearchResult]] = defaultdict(list)
    for result in results:
        groups[result.method].append(result)
    return groups
