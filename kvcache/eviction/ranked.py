"""Policies that rank blocks by a number: LFU, and Mooncake's length-aware cache."""

import heapq
from collections import OrderedDict
from collections.abc import Hashable

from kvcache.eviction.policy import EvictionPolicy

Rank = tuple[int, int]


class LFU(EvictionPolicy):
    """Evicts the block with the fewest uses since it was inserted, and of equals the least recently used.

    Blocks of one rank share a queue; a heap holds the ranks that exist. O(log ranks), and there are as many ranks as
    different counts.
    """

    def __init__(self, capacity: int, keep_prefixes: bool = False) -> None:
        super().__init__(capacity, keep_prefixes)
        self._rank: dict[Hashable, Rank] = {}
        self._queues: dict[Rank, OrderedDict[Hashable, None]] = {}
        self._ranks: list[Rank] = []

    def _enter(self, key: Hashable, now: float, depth: int) -> None:
        self._place(key, (1, 0))

    def _use(self, key: Hashable, now: float) -> None:
        uses, order = self._rank[key]
        self._leave(key)
        self._place(key, (uses + 1, order))

    def _place(self, key: Hashable, rank: Rank) -> OrderedDict[Hashable, None]:
        queue = self._queues.get(rank)
        if queue is None:
            queue = self._queues[rank] = OrderedDict()
            heapq.heappush(self._ranks, rank)
        queue[key] = None
        self._rank[key] = rank
        return queue

    def _next(self) -> Hashable | None:
        while self._ranks:
            queue = self._queues[self._ranks[0]]
            if queue:
                return queue.popitem(last=False)[0]
            del self._queues[heapq.heappop(self._ranks)]
        return None

    def _restore(self, key: Hashable) -> None:
        self._place(key, self._rank[key]).move_to_end(key, last=False)

    def _leave(self, key: Hashable) -> None:
        del self._queues[self._rank.pop(key)][key]

    def _evicted(self, key: Hashable) -> None:
        del self._rank[key]


class LengthAware(LFU):
    """Mooncake's LengthAwareCache (arXiv, section 4.3): LFU in which, of equal counts, late blocks of prompts go first.

    The paper leaves the direction open ("prioritising cache blocks occurring later in requests"). Evicting late blocks
    is the reading that keeps prefixes whole; keeping them would leave blocks that no prompt can reach.
    """

    def _enter(self, key: Hashable, now: float, depth: int) -> None:
        self._place(key, (1, -depth))
