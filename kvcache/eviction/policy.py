"""What every eviction policy is: an order over the blocks of one tier, with pins. Owns no data, reads no clock."""

import abc
from collections.abc import Hashable, Iterator, Sequence

from kvcache.errors import KVCacheError


class EvictionPolicy(abc.ABC):
    """Order in which the blocks of one tier are evicted.

    The owner of a tier passes whole prompts to `admit`; or the owner calls `insert` for a new block, `touch` for a
    present one, and `evict` until the tier fits its limit. Pinned blocks (those in use) are never evicted: a pinned
    block whose turn comes is set aside, and is the next victim again once its last pin is removed. Every call is O(1)
    amortised unless a policy says otherwise.

    Attributes:
        capacity: blocks that the tier holds. Policies that split the tier or remember evicted blocks are sized by it.
        keep_prefixes: the prefix rule: no block is evicted before the blocks that continue it, because no prompt can
            reach those without it. A block is pinned while a child of it is present; `remove` ignores the rule.
    """

    # Whether a new block replaces a present one, or competes with all present ones and may itself be evicted.
    _replaces = False

    def __init__(self, capacity: int, keep_prefixes: bool = False) -> None:
        if capacity < 1:
            raise KVCacheError(f"`capacity` is {capacity} blocks; an eviction policy needs room for at least one.")
        self.capacity = capacity
        self.keep_prefixes = keep_prefixes
        self._parent: dict[Hashable, Hashable] = {}
        self._present: set[Hashable] = set()
        self._pins: dict[Hashable, int] = {}
        self._aside: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._present)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._present

    def __iter__(self) -> Iterator[Hashable]:
        """Iterates over the present blocks, in no order."""
        return iter(self._present)

    def insert(self, key: Hashable, now: float, parent: Hashable | None = None, depth: int = 0) -> None:
        """Adds a block.

        Args:
            key: of the block.
            now: seconds (or any other logical time) that never decrease.
            parent: key of the block before it in its prompt; `None` for a first block, or where it does not matter.
            depth: how many blocks are before it in its prompt.

        Raises:
            KVCacheError: the block is present already.
        """
        if key in self._present:
            raise KVCacheError(f"Block {key!r} is here already; `touch` it instead of inserting it again.")
        self._present.add(key)
        self._enter(key, now, depth)
        if self.keep_prefixes and parent is not None:
            self._parent[key] = parent
            self.pin(parent)

    def touch(self, key: Hashable, now: float) -> None:
        """Records a use of a block. Raises `KVCacheError` where the block is not present."""
        if key not in self._present:
            raise KVCacheError(f"Block {key!r} is not here; `insert` it before touching it.")
        if key in self._aside:
            self._aside.remove(key)
            self._restore(key)
        self._use(key, now)

    def access(self, path: Sequence[Hashable], now: float) -> None:
        """Touches the present blocks of one prompt and inserts the others; `path` begins with the first block.

        The last block goes first, so that no block looks older than the blocks after it. Nothing is evicted: call
        `evict` while the tier holds too many.
        """
        present = self._present
        path = unique(path)
        for place in range(len(path) - 1, -1, -1):
            key = path[place]
            if key in present:
                self.touch(key, now)
            else:
                self.insert(key, now, path[place - 1] if place else None, place)

    def admit(self, path: Sequence[Hashable], now: float) -> list[Hashable]:
        """Does `access` within `capacity` and returns the evicted blocks.

        Where new blocks replace others, room is made first and never from the prompt's own blocks, and of a prompt
        longer than the capacity the beginning is kept. Otherwise room is made afterwards, from all blocks alike.

        Raises:
            KVCacheError: too many blocks are pinned.
        """
        if not self._replaces:
            self.access(path, now)
            return [self.evict() for _ in range(len(self) - self.capacity)]
        path = unique(path)[: self.capacity]
        here = [key for key in path if key in self._present]
        for key in here:
            self.pin(key)
        evicted = [self.evict() for _ in range(len(self) + len(path) - len(here) - self.capacity)]
        for key in here:
            self.unpin(key)
        self.access(path, now)
        return evicted

    def evict(self) -> Hashable:
        """Removes and returns the block whose loss costs least. Raises `KVCacheError` where all are pinned."""
        while (key := self._next()) is not None:
            if key not in self._pins:
                self._present.remove(key)
                self._evicted(key)
                if self._parent:
                    self._orphan(key)
                return key
            self._aside.add(key)
        raise KVCacheError(f"None of {len(self)} blocks can be evicted: unpin one, or lower what is asked for.")

    def remove(self, key: Hashable) -> None:
        """Forgets a block that left for another reason than room. Raises `KVCacheError` where it is not present."""
        if key not in self._present:
            raise KVCacheError(f"Block {key!r} is not here, so it cannot be removed.")
        self._present.remove(key)
        if key in self._aside:
            self._aside.remove(key)
            self._restore(key)
        self._leave(key)
        self._orphan(key)

    def _orphan(self, key: Hashable) -> None:
        if key in self._parent:
            self.unpin(self._parent.pop(key))

    def pin(self, key: Hashable) -> None:
        """Keeps a block from being evicted until as many calls of `unpin`. The block need not be present yet."""
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: Hashable) -> None:
        """Removes one pin. Raises `KVCacheError` for a block that is not pinned."""
        pins = self._pins.get(key, 0)
        if not pins:
            raise KVCacheError(f"Block {key!r} is not pinned; unpin as often as it was pinned.")
        if pins > 1:
            self._pins[key] = pins - 1
            return
        del self._pins[key]
        if key in self._aside:
            self._aside.remove(key)
            self._restore(key)

    @abc.abstractmethod
    def _enter(self, key: Hashable, now: float, depth: int) -> None:
        """Puts a new block into the order."""

    @abc.abstractmethod
    def _use(self, key: Hashable, now: float) -> None:
        """Records a use of a block in the order."""

    @abc.abstractmethod
    def _next(self) -> Hashable | None:
        """Takes the next victim out of the order; `None` when it is empty."""

    @abc.abstractmethod
    def _restore(self, key: Hashable) -> None:
        """Puts a block that `_next` gave back into the order, as the next victim."""

    @abc.abstractmethod
    def _leave(self, key: Hashable) -> None:
        """Takes a block out of the order."""

    def _evicted(self, key: Hashable) -> None:  # noqa: B027 - most policies have no such memory
        """Records that a block that `_next` gave is evicted, in policies that remember evicted blocks."""


def unique(path: Sequence[Hashable]) -> Sequence[Hashable]:
    """Returns `path` without repetitions. A chain of prefixes has none; a damaged trace may."""
    first = dict.fromkeys(path)
    return path if len(first) == len(path) else list(first)
