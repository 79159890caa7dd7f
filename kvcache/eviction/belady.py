"""Belady's optimum: the ceiling that no policy without foresight passes."""

import heapq
from collections.abc import Hashable, Sequence

from kvcache.errors import KVCacheError
from kvcache.eviction.policy import EvictionPolicy, unique

_NEVER = 1 << 62


class Belady(EvictionPolicy):
    """Evicts the block whose next use is furthest away (Belady, 1966), given all prompts in advance.

    No policy that may drop a block as soon as its prompt has passed hits more blocks: keeping a block from one use to
    the next is an interval, and taking the intervals that end first fits most of them. The prefix rule changes nothing,
    because a parent's next use is never after that of its child, and of equal ones the older block goes first.
    O(log capacity).
    """

    def __init__(self, capacity: int, paths: Sequence[Sequence[Hashable]], keep_prefixes: bool = False) -> None:
        """`paths`: the blocks of every prompt, in the order in which `access` will be called with them."""
        super().__init__(capacity, keep_prefixes)
        self._uses: dict[Hashable, list[int]] = {}
        for number in range(len(paths) - 1, -1, -1):
            for key in unique(paths[number]):
                self._uses.setdefault(key, [_NEVER]).append(number)
        self._order: list[tuple[int, int, Hashable]] = []
        self._entry: dict[Hashable, tuple[int, int, Hashable]] = {}
        self._count = 0

    def _enter(self, key: Hashable, now: float, depth: int) -> None:
        uses = self._uses.get(key)
        if not uses or len(uses) < 2:
            raise KVCacheError(f"Block {key!r} is used more often than the prompts given in advance say.")
        uses.pop()
        self._count += 1
        self._push(key, (-uses[-1], self._count, key))

    def _use(self, key: Hashable, now: float) -> None:
        self._enter(key, now, 0)

    def _push(self, key: Hashable, entry: tuple[int, int, Hashable]) -> None:
        # An older entry of the same block stays in the heap; `_next` skips it.
        self._entry[key] = entry
        heapq.heappush(self._order, entry)

    def _next(self) -> Hashable | None:
        while self._order:
            entry = heapq.heappop(self._order)
            if self._entry.get(entry[2]) is entry:
                return entry[2]
        return None

    def _restore(self, key: Hashable) -> None:
        heapq.heappush(self._order, self._entry[key])

    def _leave(self, key: Hashable) -> None:
        del self._entry[key]

    def _evicted(self, key: Hashable) -> None:
        del self._entry[key]
