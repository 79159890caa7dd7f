"""The ledger of a search: every evaluation is counted here, so that methods compare at equal budget.

The unit is one evaluation of a complete code. `evaluate` counts distinct codes, for methods that propose whole codes;
`charge` counts whatever the caller says it evaluated, for methods that score a neighbourhood on the device.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from gan import catalogue
from gan.hash_set import HashSet
from gan.problems import Problem
from gan.sequences import codes as _codes

Progress = Callable[[int, float], None]


class BudgetSpentError(RuntimeError):
    """An evaluation was asked for after the last one had been used."""


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """What one search found and what it cost."""

    problem: Problem
    method: str
    seed: int
    evaluations: int
    best: float
    best_code: np.ndarray
    curve: tuple[tuple[int, float], ...]
    """(evaluations, best score so far) at every improvement, and at the end."""
    entries: tuple[catalogue.Entry, ...]
    """Every distinct hit, in the order in which they were found; without a hit, the best code."""

    def evaluations_to(self, score: float) -> int | None:
        """Evaluations after which the best score reached `score`, float32 rounding allowed; None if it never did."""
        slack = 1e-5 * abs(score)
        return next((evaluations for evaluations, best in self.curve if best >= score - slack), None)

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
        progress: Progress | None = None,
    ) -> None:
        if budget < 1:
            raise ValueError(f"`budget` is {budget}; it must be at least 1 evaluation.")
        self.problem, self.budget, self.method, self.seed = problem, budget, method, seed
        self.evaluations = 0
        self.best = -np.inf
        self.best_code = np.ones(problem.chips, np.int8)
        self.curve: list[tuple[int, float]] = []
        self._best_at = 0
        self._stop_at = np.inf if stop_at is None else stop_at - 1e-5 * abs(stop_at)
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
        """Whether the search must end: no evaluation is left, or `stop_at` is reached."""
        return self.remaining <= 0 or self.best >= self._stop_at

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

    def charge(self, evaluations: int, codes: np.ndarray, scores: np.ndarray) -> None:
        """Counts steps of `evaluations` each made elsewhere, and takes what they found worth keeping.

        Codes int8 `[steps, n, chips]` with scores `[steps, n]` count as found at the end of their step. The search ends
        with the step that reaches `stop_at`; a step beyond the budget spends what is left and finds nothing.
        """
        covered = min(len(scores), self.remaining // evaluations)
        if covered < len(scores):
            self.evaluations = self.budget - covered * evaluations
        scores = np.asarray(scores)[:covered]
        stops = np.flatnonzero(scores.max(1, initial=-np.inf) >= self._stop_at)
        steps = int(stops[0]) + 1 if stops.size else covered
        ends = self.evaluations + evaluations * np.arange(1, steps + 1)
        self.evaluations += evaluations * steps
        numbers = np.repeat(ends, scores.shape[1])
        self._record(
            np.asarray(codes[:steps], np.int8).reshape(-1, self.problem.chips), scores[:steps].ravel(), numbers
        )

    def _record(self, codes: np.ndarray, scores: np.ndarray, numbers: np.ndarray) -> None:
        if scores.size:
            running = np.maximum.accumulate(np.maximum(scores, self.best)) + 0.0  # no -0, which tables would show
            better = np.flatnonzero(np.diff(running, prepend=self.best) > 0)
            self.curve.extend((int(numbers[i]), float(running[i])) for i in better)
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
        if self._hit_codes:
            codes, numbers = np.concatenate(self._hit_codes), np.concatenate(self._hit_at)
        else:
            codes, numbers = self.best_code[None], np.array([self._best_at])
        return SearchResult(
            problem=self.problem,
            method=self.method,
            seed=self.seed,
            evaluations=self.evaluations,
            best=self.best,
            best_code=self.best_code,
            curve=(*self.curve, (self.evaluations, self.best)),
            entries=tuple(catalogue.certified(self.problem, codes, self.method, numbers)),
        )


def score_in_buckets(problem: Problem, codes: np.ndarray) -> np.ndarray:
    """Scores float32 `[B]` of codes int8 `[B, chips]`, batches padded to powers of two so that few shapes compile."""
    count = codes.shape[0]
    bucket = max(64, 1 << (count - 1).bit_length())
    padded = np.concatenate([codes, np.ones((bucket - count, codes.shape[1]), np.int8)]) if bucket > count else codes
    return np.array(problem.score(padded))[:count]  # on the host: JAX would compile a slice for every count
