"""Inter-token gaps of many iterations as a few arithmetic progressions."""

import heapq
from collections.abc import Iterable
from math import inf, sqrt

# (first, increment, count): gaps of first, first + increment, ... seconds; increment is never negative.
Progression = tuple[float, float, int]


def progression_sum(first: float, increment: float, count: int) -> float:
    """Seconds of `count` iterations."""
    return count * first + increment * (count * (count - 1) // 2)


def iterations_within(first: float, increment: float, seconds: float) -> int:
    """How many whole iterations fit into `seconds`."""
    if increment <= 0:
        return int(seconds / first)
    b = first - 0.5 * increment
    count = int((sqrt(b * b + 2 * increment * max(seconds, 0.0)) - b) / increment)
    # The root is off by at most one where it falls on an iteration's end.
    if count and progression_sum(first, increment, count) > seconds:
        return count - 1
    if progression_sum(first, increment, count + 1) <= seconds:
        return count + 1
    return count


def longest_mean(progressions: Iterable[Progression], count: int) -> float:
    """Mean of the `count` largest terms; runs of one progression above all others are summed at once."""
    heap = [(-(first + increment * (n - 1)), increment, n) for first, increment, n in progressions if n]
    heapq.heapify(heap)
    total, left = 0.0, count
    while left:
        negative, increment, n = heapq.heappop(heap)
        largest = -negative
        take = min(n, left)
        if increment > 0:
            rival = -heap[0][0] if heap else -inf
            if rival > largest - increment * (take - 1):
                take = min(take, int((largest - rival) / increment) + 1)
        total += take * largest - increment * (take * (take - 1) // 2)
        left -= take
        if n > take:
            heapq.heappush(heap, (increment * take - largest, increment, n - take))
    return total / count
