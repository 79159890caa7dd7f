"""What every eviction policy is: an order over the blocks of one tier, with pins. Owns no data, reads no clock."""

import abc
from collections.abc import Hashable, Iterator, Sequence

from kvcache.errors import KVCacheError


class EvictionPolicy(abc.ABC):
    """Which block leaves next.

    The owner of a tier passes whole prompts to `admit`; or it calls `insert` for a block that was not there, `touch`
    for one that was, and `evict` until the tier fits its limit. Pinned blocks (those in use) are never evicted: one
    that comes up is set aside, and is next in line again when its last pin goes. Every call is O(1) amortised unless
    a policy says otherwise.

    Attributes:
        capacity: blocks that the tier holds; policies that split it or remember evicted blocks size themselves by it.
        keep_prefixes: the prefix rule: no block leaves before those that continue it, for without it no prompt reaches
            them. A block is then pinned while a child of it is here. (`remove` is the owner's word and may take it.)
    """

    # Whether a new block replaces one that is here, or competes with them and may be the one that leaves.
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
        """Blocks that are here, in no order."""
        return iter(self._present)

    def insert(self, key: Hashable, now: float, parent: Hashable | None = None, depth: int = 0) -> None:
        """Takes in a block.

        Args:
            key: of the block.
            now: seconds (or any other logical time) that never decrease.
            parent: key of the block before it in its prompt; `None` for a first block, or where it does not matter.
            depth: how many blocks are before it in its prompt.

        Raises:
            KVCacheError: the block is here already.
        """
        if key in self._present:
            raise KVCacheError(f"Block {key!r} is here already; `touch` it instead of inserting it again.")
        self._present.add(key)
        self._enter(key, now, depth)
        if self.keep_prefixes and parent is not None:
            self._parent[key] = parent
            self.pin(parent)

    def touch(self, key: Hashable, now: float) -> None:
        """Notes a use of a block. Raises `KVCacheError` where it is not here."""
        if key not in self._present:
            raise KVCacheError(f"Block {key!r} is not here; `insert` it before touching it.")
        if key in self._aside:
            self._aside.remove(key)
            self._restore(key)
        self._use(key, now)

    def access(self, path: Sequence[Hashable], now: float) -> None:
        """One prompt's blocks, from its first: touches those that are here and inserts the others.

        The last block goes first, so that no block looks older than those after it. Evicts nothing; call `evict` while
        there are too many.
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
        """`access` within `capacity`; returns the blocks that were evicted.

        Where new blocks replace others, room is made before they come, never from the prompt's own, and a prompt longer
        than the capacity keeps its beginning. Otherwise room is made afterwards, from all alike.

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
        """Forgets a block that left for other reasons than room. Raises `KVCacheError` where it is not here."""
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
        """Keeps a block from being evicted until as many `unpin`. It need not be here yet."""
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: Hashable) -> None:
        """Takes back one `pin`. Raises `KVCacheError` without one."""
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
        """A new block takes its place in the order."""

    @abc.abstractmethod
    def _use(self, key: Hashable, now: float) -> None:
        """A block in the order was used."""

    @abc.abstractmethod
    def _next(self) -> Hashable | None:
        """Takes the next victim out of the order; `None` when it is empty."""

    @abc.abstractmethod
    def _restore(self, key: Hashable) -> None:
        """Puts back a block that `_next` gave, as the next victim."""

    @abc.abstractmethod
    def _leave(self, key: Hashable) -> None:
        """Takes a block out of the order."""

    def _evicted(self, key: Hashable) -> None:  # noqa: B027 - most policies have no such memory
        """A block that `_next` gave is gone; policies with a memory of evicted blocks note it here."""


def unique(path: Sequence[Hashable]) -> Sequence[Hashable]:
    """`path` without repetitions, which no chain of prefixes has but a damaged trace may."""
    first = dict.fromkeys(path)
    return path if len(first) == len(path) else list(first)
