"""Instances in the order of a load that changes with every placement."""

import bisect
from collections.abc import Iterator


class LoadOrder:
    """Instance indices sorted by load: O(log n) comparisons per change, in-order walks from the least loaded.

    A sorted list beats a balanced tree here: moving some thousand pointers costs less than one tree node.
    """

    def __init__(self) -> None:
        self._sorted: list[tuple[float, int]] = []
        self._load: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._sorted)

    def __contains__(self, index: int) -> bool:
        return index in self._load

    def __iter__(self) -> Iterator[tuple[float, int]]:
        """(load, index), least loaded first; the order must not change during the walk."""
        return iter(self._sorted)

    def set(self, index: int, load: float) -> None:
        """Adds an instance, or moves it to its new load."""
        self.discard(index)
        self._load[index] = load
        bisect.insort(self._sorted, (load, index))

    def discard(self, index: int) -> None:
        """Takes an instance out, if it is there."""
        load = self._load.pop(index, None)
        if load is not None:
            del self._sorted[bisect.bisect_left(self._sorted, (load, index))]

    def indices(self) -> list[int]:
        """All instances, in order of index."""
        return sorted(self._load)
