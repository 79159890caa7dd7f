"""A set of 64-bit hashes that adds whole arrays at once: 16 to 32 bytes an element, some million elements a second."""

import numpy as np


class HashSet:
    """Open addressing with linear probing over one uint64 table; 0 marks a free slot, so it is no element."""

    def __init__(self) -> None:
        self._table = np.zeros(1 << 12, np.uint64)
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def add(self, keys: np.ndarray) -> np.ndarray:
        """Adds nonzero hashes uint64 `[B]`; bool `[B]`: which were new, the first of equal ones only."""
        unique, first = np.unique(keys, return_index=True)
        while 2 * (self._size + unique.size) > self._table.size:
            self._grow()
        fresh = np.zeros(keys.size, np.bool_)
        fresh[first] = self._insert(unique)
        self._size += int(fresh.sum())
        return fresh

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Whether each of nonzero hashes uint64 `[B]` is an element."""
        mask = self._table.size - 1
        found = np.zeros(keys.size, np.bool_)
        pending = np.arange(keys.size)
        slots = (keys & np.uint64(mask)).astype(np.int64)
        while pending.size:
            occupant = self._table[slots[pending]]
            found[pending] = occupant == keys[pending]
            pending = pending[(occupant != 0) & (occupant != keys[pending])]
            slots[pending] = (slots[pending] + 1) & mask
        return found

    def _grow(self) -> None:
        old = self._table[self._table != 0]
        self._table = np.zeros(4 * self._table.size, np.uint64)
        self._insert(old)

    def _insert(self, keys: np.ndarray) -> np.ndarray:
        """Inserts distinct keys; bool `[B]`: which were not there."""
        mask = self._table.size - 1
        fresh = np.zeros(keys.size, np.bool_)
        pending = np.arange(keys.size)
        slots = (keys & np.uint64(mask)).astype(np.int64)
        while pending.size:
            wanted, slot = keys[pending], slots[pending]
            occupant = self._table[slot]
            free = occupant == 0
            # Several keys may claim one free slot: the last write wins, the others see it when they look again.
            self._table[slot[free]] = wanted[free]
            won = free & (self._table[slot] == wanted)
            fresh[pending[won]] = True
            pending = pending[~won & (occupant != wanted)]
            slots[pending] = (slots[pending] + 1) & mask
        return fresh
