"""Pages of the device tier on the host: who holds which, and which are cached. Knows no JAX."""

import collections
import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from kvcache.errors import KVCacheError, OutOfPagesError
from kvcache.eviction.policy import EvictionPolicy


@dataclasses.dataclass(frozen=True, slots=True)
class Allocation:
    """Pages taken by one `PageAllocator.allocate`.

    Attributes:
        pages: the pages, with undefined content.
        evicted: (key, page) of those that were cached. The KV of the key can be read from the page until it is written.
    """

    pages: list[int]
    evicted: list[tuple[Hashable, int]]


class PageAllocator:
    """Ref-counted page ids with automatic prefix caching.

    A page is *free*, *referenced* (by one or more sequences), or *cached*: unreferenced, but its tokens are known
    under a key, so a later sequence with the same prefix takes it back without computing anything. When no page is
    free, cached pages are reused in the order of `victims`. Each method either succeeds whole or changes nothing.

    The key of a page enters `victims` when the page loses its last reference. While the page is referenced again, its
    key is pinned there; when that ends, the key counts as used. Time is counted in calls of `release`.
    """

    def __init__(self, num_pages: int, victims: EvictionPolicy):
        """`victims` orders the keys of cached pages; it is empty at first, and used by nobody else."""
        if num_pages < 1:
            raise KVCacheError(f"`num_pages` is {num_pages}; a pool needs at least one page. Give it more memory.")
        self.num_pages = num_pages
        self._victims = victims
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = [0] * num_pages
        self._page_of: dict[Hashable, int] = {}
        self._key_of: list[Hashable | None] = [None] * num_pages
        # Pages whose keys `victims` knows. They are pinned there while they are referenced.
        self._ordered = bytearray(num_pages)
        self._cached = 0
        self._releases = 0

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out now: free ones and cached ones."""
        return len(self._free) + self._cached

    @property
    def referenced(self) -> int:
        """Pages that some sequence holds."""
        return self.num_pages - self.available

    @property
    def cached(self) -> int:
        """Unreferenced pages whose content can still be hit."""
        return self._cached

    def references(self, page: int) -> int:
        """Returns how many sequences hold `page`."""
        return self._references[page]

    def allocate(self, count: int) -> Allocation:
        """Takes `count` pages with one reference each, free ones first. Raises `OutOfPagesError` for too many."""
        if count > self.available:
            raise OutOfPagesError(
                f"{count} pages asked for, {self.available} of {self.num_pages} available. "
                "Release or preempt a sequence."
            )
        references, victims = self._references, self._victims
        pages = [self._free.pop() for _ in range(min(count, len(self._free)))]
        evicted = []
        for _ in range(count - len(pages)):
            key = victims.evict()
            page = self._page_of.pop(key)
            self._key_of[page] = None
            self._ordered[page] = False
            evicted.append((key, page))
            pages.append(page)
        self._cached -= len(evicted)
        for page in pages:
            references[page] = 1
        return Allocation(pages, evicted)

    def lookup(self, keys: Iterable[Hashable]) -> list[int]:
        """Returns the pages of the longest present run of `keys`, from the first key on, and adds no reference."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def unreferenced(self, pages: Iterable[int]) -> int:
        """Returns how many of `pages` are cached only, so that acquiring them lowers `available`."""
        return sum(not self._references[page] and self._ordered[page] for page in pages)

    def acquire(self, pages: Sequence[int]) -> None:
        """Adds one reference to each of `pages`. Raises `KVCacheError` where one is neither referenced nor cached."""
        references = self._references
        for page in pages:
            if not references[page] and not self._ordered[page]:
                raise KVCacheError(f"page {page} is free and has no content; `lookup` it again before acquiring it.")
        for page in pages:
            if not references[page]:
                self._victims.pin(self._key_of[page])
                self._cached -= 1
            references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference of each of `pages`, given in the order of the sequence.

        Later pages become reusable first: a prefix is worth more than what follows it. Raises `KVCacheError` for a page
        with fewer references than are dropped.
        """
        references = self._references
        if len(set(pages)) < len(pages) or not all(map(references.__getitem__, pages)):
            self._check_release(pages)
        self._releases += 1
        victims, now = self._victims, self._releases
        for depth in range(len(pages) - 1, -1, -1):
            page = pages[depth]
            references[page] -= 1
            if references[page]:
                continue
            if (key := self._key_of[page]) is None:
                self._free.append(page)
                continue
            self._cached += 1
            if self._ordered[page]:
                victims.touch(key, now)
                victims.unpin(key)
            else:
                victims.insert(key, now, depth=depth)
                self._ordered[page] = True

    def publish(self, page: int, key: Hashable) -> None:
        """Declares that referenced `page` is full and immutable under `key`. The first page of a key stays its page."""
        if not self._references[page]:
            raise KVCacheError(f"page {page} has no reference; publish a page while its sequence still holds it.")
        if key not in self._page_of and self._key_of[page] is None:
            self._page_of[key] = page
            self._key_of[page] = key

    def _check_release(self, pages: Sequence[int]) -> None:
        for page, count in collections.Counter(pages).items():
            if self._references[page] < count:
                raise KVCacheError(f"page {page} released {count} times but has {self._references[page]} references.")


class PageTable:
    """Page ids of one sequence as a fixed-width int32 row (`row`), so that a batch's table is a stack of rows."""

    def __init__(self, max_pages: int):
        self.row = np.zeros(max_pages, np.int32)
        self.length = 0

    @property
    def pages(self) -> list[int]:
        """The page ids in use, in the order of the sequence."""
        return self.row[: self.length].tolist()

    def extend(self, pages: Sequence[int]) -> None:
        """Appends `pages`. Raises `KVCacheError` beyond the fixed width."""
        end = self.length + len(pages)
        if end > len(self.row):
            raise KVCacheError(f"{end} pages do not fit a page table of {len(self.row)}; raise `max_model_len`.")
        self.row[self.length : end] = pages
        self.length = end

    def clear(self) -> None:
        """Empties the table; the pages themselves are the allocator's."""
        self.row[: self.length] = 0
        self.length = 0
