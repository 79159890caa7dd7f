"""Policies made of queues: FIFO, LRU, SIEVE and S3-FIFO. Queues are dicts in order of insertion, oldest first."""

from collections import OrderedDict
from collections.abc import Hashable

from kvcache.eviction.policy import EvictionPolicy

Queue = OrderedDict[Hashable, int]


class FIFO(EvictionPolicy):
    """Evicts the block that was inserted first, used or not."""

    def __init__(self, capacity: int, keep_prefixes: bool = False) -> None:
        super().__init__(capacity, keep_prefixes)
        self._queue: OrderedDict[Hashable, None] = OrderedDict()

    def _enter(self, key: Hashable, now: float, depth: int) -> None:
        self._queue[key] = None

    def _use(self, key: Hashable, now: float) -> None:
        pass

    def _next(self) -> Hashable | None:
        return self._queue.popitem(last=False)[0] if self._queue else None

    def _restore(self, key: Hashable) -> None:
        self._queue[key] = None
        self._queue.move_to_end(key, last=False)

    def _leave(self, key: Hashable) -> None:
        del self._queue[key]


class LRU(FIFO):
    """Evicts the least recently used block (Mooncake, section 3.2.1)."""

    def _use(self, key: Hashable, now: float) -> None:
        self._queue.move_to_end(key)


class Sieve(EvictionPolicy):
    """SIEVE (Zhang et al., NSDI'24): a hand passes from the oldest block to the newest and spares used blocks once.

    The queue is kept in two halves, before and behind the hand. A spared block moves behind the hand; when no block is
    before the hand, the hand starts again at the oldest block.
    """

    # A new block that competed would always lose to blocks that were used, and the hand would never come round.
    _replaces = True

    def __init__(self, capacity: int, keep_prefixes: bool = False) -> None:
        super().__init__(capacity, keep_prefixes)
        self._before: Queue = OrderedDict()
        self._behind: Queue = OrderedDict()

    def _enter(self, key: Hashable, now: float, depth: int) -> None:
        self._before[key] = 0

    def _use(self, key: Hashable, now: float) -> None:
        (self._before if key in self._before else self._behind)[key] = 1

    def _next(self) -> Hashable | None:
        while self._before or self._behind:
            if not self._before:
                self._before, self._behind = self._behind, self._before
            key, used = self._before.popitem(last=False)
            if not used:
                return key
            self._behind[key] = 0
        return None

    def _restore(self, key: Hashable) -> None:
        self._before[key] = 0
        self._before.move_to_end(key, last=False)

    def _leave(self, key: Hashable) -> None:
        del (self._before if key in self._before else self._behind)[key]


class S3FIFO(EvictionPolicy):
    """S3-FIFO (Yang et al., SOSP'23): a small queue on probation, a main queue, and ghosts of blocks that failed.

    The small queue is a tenth of the capacity. Blocks used more than once in the small queue move to the main queue;
    other blocks are evicted, and enter the main queue directly if they return while their ghost is remembered.
    """

    _replaces = True
    _MOST_USES = 3

    def __init__(self, capacity: int, keep_prefixes: bool = False) -> None:
        super().__init__(capacity, keep_prefixes)
        self._small_limit = max(1, capacity // 10)
        self._small: Queue = OrderedDict()
        self._main: Queue = OrderedDict()
        self._ghosts: OrderedDict[Hashable, None] = OrderedDict()
        self._failed: Hashable | None = None

    def _enter(self, key: Hashable, now: float, depth: int) -> None:
        if key in self._ghosts:
            del self._ghosts[key]
            self._main[key] = 0
        else:
            self._small[key] = 0

    def _use(self, key: Hashable, now: float) -> None:
        queue = self._small if key in self._small else self._main
        queue[key] = min(queue[key] + 1, self._MOST_USES)

    def _next(self) -> Hashable | None:
        self._failed = None
        while self._small or self._main:
            if self._small and (len(self._small) > self._small_limit or not self._main):
                key, uses = self._small.popitem(last=False)
                if uses <= 1:
                    self._failed = key
                    return key
                self._main[key] = 0
            else:
                key, uses = self._main.popitem(last=False)
                if not uses:
                    return key
                self._main[key] = uses - 1
        return None

    def _restore(self, key: Hashable) -> None:
        # A victim that was in use has passed probation.
        self._main[key] = 0
        self._main.move_to_end(key, last=False)

    def _leave(self, key: Hashable) -> None:
        del (self._small if key in self._small else self._main)[key]

    def _evicted(self, key: Hashable) -> None:
        if key is self._failed:
            self._ghosts[key] = None
            if len(self._ghosts) > self.capacity:
                self._ghosts.popitem(last=False)
