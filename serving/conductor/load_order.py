"""Instances in the order of a load that changes with every placement."""

import bisect
import itertools
from collections.abc import Iterator

# Entries of a run; one that outgrows this is halved.
_RUN = 64

Entry = tuple[float, int]


def _last(run: list[Entry]) -> Entry:
    return run[-1]


class LoadOrder:
    """Instance indices sorted by load, with walks from the least loaded, over all or over a set of them.

    The order is cut into runs of some dozen entries, each with a mask of its members. A change moves within one run,
    and a walk over a set passes a run without a member in one step; on a thousand instances both cost as much as on a
    hundred, but for those few steps.
    """

    def __init__(self) -> None:
        self._runs: list[list[Entry]] = []
        self._members: list[int] = []
        self._load: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self._load)

    def __contains__(self, index: int) -> bool:
        return index in self._load

    def __iter__(self) -> Iterator[Entry]:
        """(load, index), least loaded first; the order must not change during the walk."""
        return itertools.chain.from_iterable(self._runs)

    def among(self, mask: int) -> Iterator[int]:
        """Indices of the instances in `mask`, which may be the complement of a set: least loaded first."""
        for run, members in zip(self._runs, self._members, strict=True):
            if members & mask:
                for _, index in run:
                    if mask >> index & 1:
                        yield index

    def set(self, index: int, load: float) -> None:
        """Adds an instance, or moves it to its new load."""
        self.discard(index)
        self._load[index] = load
        entry = (load, index)
        if not self._runs:
            self._runs, self._members = [[entry]], [1 << index]
            return
        place = min(bisect.bisect_left(self._runs, entry, key=_last), len(self._runs) - 1)
        run = self._runs[place]
        bisect.insort(run, entry)
        self._members[place] |= 1 << index
        if len(run) > _RUN:
            self._halve(place)

    def _halve(self, place: int) -> None:
        run = self._runs[place]
        halves = [run[: len(run) // 2], run[len(run) // 2 :]]
        self._runs[place : place + 1] = halves
        self._members[place : place + 1] = [sum(1 << index for _, index in half) for half in halves]

    def discard(self, index: int) -> None:
        """Takes an instance out, if it is there."""
        load = self._load.pop(index, None)
        if load is None:
            return
        entry = (load, index)
        place = bisect.bisect_left(self._runs, entry, key=_last)
        run = self._runs[place]
        del run[bisect.bisect_left(run, entry)]
        self._members[place] ^= 1 << index
        if not run:
            del self._runs[place], self._members[place]
