"""Runs of engine steps that differ only in grown contexts: how long they take, and the gaps that they make."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol

from serving.cluster.gaps import Progression, iterations_within, progression_sum


class StepRun(Protocol):
    """Steps that follow one another."""

    def seconds(self, steps: int) -> float:
        """Of the first `steps`."""
        ...

    def within(self, seconds: float) -> int:
        """Whole steps in so many seconds."""
        ...

    def gaps(self, steps: int, stall_s: float) -> list[Progression]:
        """Gaps between the tokens of the first `steps`; `stall_s` passed from the token before to the first step."""
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class EvenRun:
    """Each step takes `increment` seconds longer than the one before: closed form, however many there are."""

    first: float
    increment: float

    def seconds(self, steps: int) -> float:
        return progression_sum(self.first, self.increment, steps)

    def within(self, seconds: float) -> int:
        return iterations_within(self.first, self.increment, seconds)

    def gaps(self, steps: int, stall_s: float) -> list[Progression]:
        if stall_s <= 0:
            return [(self.first, self.increment, steps)]
        return [(self.first + stall_s, 0.0, 1), (self.first + self.increment, self.increment, steps - 1)]


class NoisyRun:
    """Each step takes its time of the even run times a factor of its own."""

    def __init__(self, even: EvenRun, factors: Sequence[float]) -> None:
        self._steps = [factor * (even.first + number * even.increment) for number, factor in enumerate(factors)]
        self._ends = [0.0, *itertools.accumulate(self._steps)]

    def seconds(self, steps: int) -> float:
        return self._ends[steps]

    def within(self, seconds: float) -> int:
        return bisect.bisect_right(self._ends, seconds) - 1

    def gaps(self, steps: int, stall_s: float) -> list[Progression]:
        first, *others = self._steps[:steps]
        return [(first + max(0.0, stall_s), 0.0, 1), *((seconds, 0.0, 1) for seconds in others)]
