"""The ledger of a search: every evaluation is counted here, so that methods compare at equal budget.

The unit is one evaluation of a complete code. `evaluate` counts distinct codes, for methods that propose whole codes;
`charge` counts whatever the caller says it evaluated, for methods that score a neighbourhood on the device. A gradient
counts as one evaluation although it ranks all single-chip flips, for which tabu search pays L: gradients are counted
apart, so that a second bill can be shown. Processor seconds are the third currency.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gan import catalogue
from gan.hash_set import HashSet
from gan.problems import Problem
from gan.sequences import codes as _codes

Progress = Callable[[int, float], None]


class BudgetSpentError(RuntimeError):
    """An evaluation was asked for after the last one had been used."""


class Point(NamedTuple):
    """A moment of a search.

    Attributes:
        evaluations: made so far, gradients among them.
        gradients: made so far.
        cpu_s: processor seconds of this process since the ledger was opened, all threads together, compilation
            included; of a point within a batch, those at the end of the batch.
        best: the best score so far.
    """

    evaluations: int
    gradients: int
    cpu_s: float
    best: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What one search found and what it cost."""

    problem: Problem
    method: str
    seed: int
    best: float
    best_code: np.ndarray
    curve: tuple[Point, ...]
    """A point at every improvement, and one at the end."""
    entries: tuple[catalogue.Entry, ...]
    """Every distinct hit, in the order in which they were found; without a hit, the best code."""

    @property
    def evaluations(self) -> int:
        """Evaluations made."""
        return self.curve[-1].evaluations

    def reached(self, score: float) -> Point | None:
        """The first point whose best score is `score` or more, float32 rounding allowed; None if there is none."""
        slack = 1e-5 * abs(score)
        return next((point for point in self.curve if point.best >= score - slack), None)

    def evaluations_to(self, score: float) -> int | None:
        """Evaluations after which the best score reached `score`; None if it never did."""
        point = self.reached(score)
        return point.evaluations if point else None

    def bill_at_chips(self, point: Point) -> int:
        """Evaluations at a point when a gradient, which ranks the flips of all L chips, is billed at L."""
        return point.evaluations + (self.problem.chips - 1) * point.gradients

    @property
    def classes(self) -> int:
        """Number of distinct classes among the entries."""
        return len({entry.class_id for entry in self.entries})


class Ledger:
    """Counts evaluations against a budget and keeps the best code, the best-so-far curve and all hits.

    Args:
        problem: what is searched.
        budget: evaluations that may be used.
        method, seed: who searches; they go into the result.
        stop_at: a score at which the search counts as finished before its budget is spent.
        cpu_limit_s: processor seconds after which it counts as finished.
        progress: called with (evaluations, best) after every batch.
    """

    def __init__(
        self,
        problem: Problem,
        budget: int,
        method: str = "",
        seed: int = 0,
        *,
        stop_at: float | None = None,
        cpu_limit_s: float | None = None,
        progress: Progress | None = None,
    ) -> None:
        if budget < 1:
            raise ValueError(f"`budget` is {budget}; it must be at least 1 evaluation.")
        self.problem, self.budget, self.method, self.seed = problem, budget, method, seed
        self.evaluations = self.gradients = 0
        self.best = -np.inf
        self.best_code = np.ones(problem.chips, np.int8)
        self.curve: list[Point] = []
        self._best_at = 0
        self._stop_at = np.inf if stop_at is None else stop_at - 1e-5 * abs(stop_at)
        self._cpu_limit_s = np.inf if cpu_limit_s is None else cpu_limit_s
        self._opened_s = time.process_time()
        self._progress = progress
        self._seen, self._hits = HashSet(), HashSet()
        self._hit_codes: list[np.ndarray] = []
        self._hit_at: list[np.ndarray] = []

    @property
    def remaining(self) -> int:
        """Evaluations left."""
        return self.budget - self.evaluations

    @property
    def spent(self) -> bool:
        """Whether the search must end: no evaluation is left, `stop_at` is reached, or the processor's time is up."""
        return self.remaining <= 0 or self.best >= self._stop_at or self.cpu_s >= self._cpu_limit_s

    @property
    def cpu_s(self) -> float:
        """Processor seconds since the ledger was opened."""
        return time.process_time() - self._opened_s

    @property
    def hits(self) -> int:
        """Distinct hits so far."""
        return len(self._hits)

    def evaluate(self, codes: np.ndarray) -> np.ndarray:
        """Scores float32 `[B]` of codes int8 `[B, chips]`; counts the distinct ones not scored before.

        Codes that the budget does not cover, in the order given, score -inf.

        Raises:
            BudgetSpentError: if no evaluation was left.
        """
        if self.remaining <= 0:
            raise BudgetSpentError(f"all {self.budget} evaluations are used; look at `spent` before asking for more.")
        codes = np.ascontiguousarray(codes, np.int8)
        fresh = np.flatnonzero(self._seen.add(_codes.hash_codes(codes)))
        uncovered = fresh[self.remaining :]
        fresh = fresh[: self.remaining]
        scores = score_in_buckets(self.problem, codes)
        scores[uncovered] = -np.inf
        numbers = self.evaluations + 1 + np.arange(fresh.size)
        self.evaluations += fresh.size
        self._record(codes[fresh], scores[fresh], numbers)
        return scores

    def knows(self, codes: np.ndarray) -> np.ndarray:
        """Whether each of codes int8 `[B, chips]` was evaluated before, so that it costs nothing and tells nothing."""
        return self._seen.contains(_codes.hash_codes(codes))

    def charge(self, costs: np.ndarray, codes: np.ndarray, scores: np.ndarray) -> None:
        """Counts steps that were made elsewhere, and takes what they found worth keeping.

        A step of codes int8 `[n, chips]` with scores `[n]` costs `costs[-1]` evaluations; code i is known after
        `costs[i]` of them. The search ends with the code that reaches `stop_at`. Codes beyond the budget are dropped.

        Args:
            costs: int `[n]`, ascending.
            codes, scores: `[steps, n, chips]` and `[steps, n]`.
        """
        scores = np.asarray(scores)
        numbers = (self.evaluations + np.arange(len(scores))[:, None] * int(costs[-1]) + costs).ravel()
        covered = int(np.searchsorted(numbers, self.budget, side="right"))
        scores = scores.ravel()[:covered]
        codes = np.asarray(codes, np.int8).reshape(-1, self.problem.chips)[:covered]
        stops = np.flatnonzero(scores >= self._stop_at)
        if stops.size:
            covered = int(stops[0]) + 1
            self.evaluations = int(numbers[covered - 1])
        else:
            self.evaluations = min(self.budget, int(numbers[-1]))
        self._record(codes[:covered], scores[:covered], numbers[:covered])

    def charge_gradients(self, count: int, *, scores: int = 0) -> None:
        """Counts `count` gradients, and `scores` evaluations of which nothing is kept, as far as the budget goes."""
        self.gradients += min(count, self.remaining)
        self.evaluations += min(count + scores, self.remaining)
        self._record(np.zeros((0, self.problem.chips), np.int8), np.zeros(0), np.zeros(0, np.int64))

    def _record(self, codes: np.ndarray, scores: np.ndarray, numbers: np.ndarray) -> None:
        if scores.size:
            running = np.maximum.accumulate(np.maximum(scores, self.best)) + 0.0  # no -0, which tables would show
            better = np.flatnonzero(np.diff(running, prepend=self.best) > 0)
            cpu_s = self.cpu_s
            self.curve.extend(Point(int(numbers[i]), self.gradients, cpu_s, float(running[i])) for i in better)
            if better.size:
                self.best, self.best_code = float(running[-1]), codes[better[-1]].copy()
                self._best_at = int(numbers[better[-1]])
            self._keep_hits(codes, scores, numbers)
        if self._progress:
            self._progress(self.evaluations, self.best)

    def _keep_hits(self, codes: np.ndarray, scores: np.ndarray, numbers: np.ndarray) -> None:
        hit = np.flatnonzero(self.problem.is_hit(scores))
        if hit.size:
            hit = hit[self._hits.add(_codes.hash_codes(codes[hit]))]
            self._hit_codes.append(codes[hit])
            self._hit_at.append(numbers[hit])

    def result(self) -> SearchResult:
        """The search so far; hits are certified exactly, which takes a while when there are many."""
        end = Point(self.evaluations, self.gradients, self.cpu_s, self.best)
        if self._hit_codes:
            codes, numbers = np.concatenate(self._hit_codes), np.concatenate(self._hit_at)
        else:
            codes, numbers = self.best_code[None], np.array([self._best_at])
        return SearchResult(
            problem=self.problem,
            method=self.method,
            seed=self.seed,
            best=self.best,
            best_code=self.best_code,
            curve=(*self.curve, end),
            entries=tuple(
                catalogue.certified(self.problem, codes, method=self.method, seed=self.seed, evaluations=numbers)
            ),
        )


def score_in_buckets(problem: Problem, codes: np.ndarray) -> np.ndarray:
    """Scores float32 `[B]` of codes int8 `[B, chips]`, batches padded to powers of two so that few shapes compile."""
    count = codes.shape[0]
    bucket = max(64, 1 << (count - 1).bit_length())
    padded = np.concatenate([codes, np.ones((bucket - count, codes.shape[1]), np.int8)]) if bucket > count else codes
    return np.array(problem.score(padded))[:count]  # on the host: JAX would compile a slice for every count
