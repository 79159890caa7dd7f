"""ARC: recency and frequency, balanced by what was missed."""

from collections import OrderedDict
from collections.abc import Hashable

from kvcache.eviction.policy import EvictionPolicy

Queue = OrderedDict[Hashable, None]


class ARC(EvictionPolicy):
    """Adaptive replacement (Megiddo and Modha, FAST'03): blocks used once, blocks used again, and the ghosts of both.

    A miss on a ghost of either list moves the boundary between the two in favour of that list.
    """

    _replaces = True

    def __init__(self, capacity: int, keep_prefixes: bool = False) -> None:
        super().__init__(capacity, keep_prefixes)
        self._once: Queue = OrderedDict()
        self._again: Queue = OrderedDict()
        self._once_ghosts: Queue = OrderedDict()
        self._again_ghosts: Queue = OrderedDict()
        self._once_target = 0.0
        self._from_once = True

    def _enter(self, key: Hashable, now: float, depth: int) -> None:
        once, again = len(self._once_ghosts), len(self._again_ghosts)
        if key in self._once_ghosts:
            del self._once_ghosts[key]
            self._once_target = min(self.capacity, self._once_target + max(1.0, again / once))
            self._again[key] = None
        elif key in self._again_ghosts:
            del self._again_ghosts[key]
            self._once_target = max(0.0, self._once_target - max(1.0, once / again))
            self._again[key] = None
        else:
            self._once[key] = None

    def _use(self, key: Hashable, now: float) -> None:
        if key in self._once:
            del self._once[key]
        self._again[key] = None
        self._again.move_to_end(key)

    def _next(self) -> Hashable | None:
        self._from_once = bool(self._once) and (len(self._once) > self._once_target or not self._again)
        queue = self._once if self._from_once else self._again
        return queue.popitem(last=False)[0] if queue else None

    def _restore(self, key: Hashable) -> None:
        self._once[key] = None
        self._once.move_to_end(key, last=False)

    def _leave(self, key: Hashable) -> None:
        del (self._once if key in self._once else self._again)[key]

    def _evicted(self, key: Hashable) -> None:
        (self._once_ghosts if self._from_once else self._again_ghosts)[key] = None
        while len(self._once_ghosts) > max(0, self.capacity - len(self._once)):
            self._once_ghosts.popitem(last=False)
        while len(self._once_ghosts) + len(self._again_ghosts) > self.capacity:
            (self._again_ghosts or self._once_ghosts).popitem(last=False)
