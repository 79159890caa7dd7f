"""Inter-token gaps of many iterations as a few arithmetic progressions."""

import heapq
from collections.abc import Iterable
from math import inf, sqrt

# (first, step, count): gaps of first, first + step, ... seconds; step is never negative.
Progression = tuple[float, float, int]


def progression_sum(first: float, step: float, count: int) -> float:
    """Seconds of `count` iterations."""
    return count * first + step * (count * (count - 1) // 2)


def iterations_within(first: float, step: float, seconds: float) -> int:
    """How many whole iterations fit into `seconds`."""
    if step <= 0:
        return int(seconds / first)
    b = first - 0.5 * step
    count = int((sqrt(b * b + 2 * step * max(seconds, 0.0)) - b) / step)
    # The root is off by at most one where it falls on an iteration's end.
    if count and progression_sum(first, step, count) > seconds:
        return count - 1
    if progression_sum(first, step, count + 1) <= seconds:
        return count + 1
    return count


def longest_mean(progressions: Iterable[Progression], count: int) -> float:
    """Mean of the `count` largest terms; runs of one progression above all others are summed at once."""
    heap = [(-(first + step * (n - 1)), step, n) for first, step, n in progressions if n]
    heapq.heapify(heap)
    total, left = 0.0, count
    while left:
        negative, step, n = heapq.heappop(heap)
        largest = -negative
        take = min(n, left)
        if step > 0:
            rival = -heap[0][0] if heap else -inf
            if rival > largest - step * (take - 1):
                take = min(take, int((largest - rival) / step) + 1)
        total += take * largest - step * (take * (take - 1) // 2)
        left -= take
        if n > take:
            heapq.heappush(heap, (step * take - largest, step, n - take))
    return total / count
