"""Pages of the device tier on the host: who holds which, and which are cached. Knows no JAX."""

import collections
from collections.abc import Iterable, Sequence

import numpy as np

from kvcache.blocks import BlockKey
from kvcache.errors import KVCacheError, OutOfPagesError


class PageAllocator:
    """Ref-counted page ids with automatic prefix caching.

    A page is *free*, *referenced* (by one or more sequences), or *cached*: unreferenced, but its tokens are known
    under a key, so a later sequence with the same prefix takes it back without computing anything. Cached pages are
    reused in LRU order when no free page is left. All methods either succeed whole or change nothing.
    """

    def __init__(self, num_pages: int):
        if num_pages < 1:
            raise KVCacheError(f"`num_pages` is {num_pages}; a pool needs at least one page. Give it more memory.")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._references = np.zeros(num_pages, np.int32)
        self._page_of: dict[BlockKey, int] = {}
        self._key_of: dict[int, BlockKey] = {}
        # Unreferenced pages with a key, least recently released first.
        self._cached: collections.OrderedDict[int, None] = collections.OrderedDict()

    @property
    def available(self) -> int:
        """Pages that `allocate` can hand out now: free ones and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def referenced(self) -> int:
        """Pages that some sequence holds."""
        return self.num_pages - self.available

    @property
    def cached(self) -> int:
        """Unreferenced pages whose content can still be hit."""
        return len(self._cached)

    def references(self, page: int) -> int:
        """How many sequences hold `page`."""
        return int(self._references[page])

    def allocate(self, count: int) -> list[int]:
        """Takes `count` pages with undefined content, one reference each. Raises `OutOfPagesError` if too few."""
        if count > self.available:
            raise OutOfPagesError(
                f"{count} pages asked for, {self.available} of {self.num_pages} available. "
                "Release or preempt a sequence."
            )
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._references[page] = 1
            pages.append(page)
        return pages

    def lookup(self, keys: Iterable[BlockKey]) -> list[int]:
        """Pages of the longest run of `keys` that is present, from the first key on. Takes no reference."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def unreferenced(self, pages: Iterable[int]) -> int:
        """How many of `pages` are cached only, so that acquiring them lowers `available`."""
        return sum(page in self._cached for page in pages)

    def acquire(self, pages: Sequence[int]) -> None:
        """Adds one reference to each of `pages`, which must be referenced or cached."""
        for page in pages:
            if not self._references[page] and page not in self._cached:
                raise KVCacheError(f"page {page} is free and has no content; `lookup` it again before acquiring it.")
        for page in pages:
            self._references[page] += 1
            self._cached.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference of each of `pages`, given in the order of the sequence.

        Later pages become reusable first: a prefix is worth more than what follows it.
        """
        held = collections.Counter(pages)
        for page, count in held.items():
            if self._references[page] < count:
                raise KVCacheError(f"page {page} released {count} times but has {self._references[page]} references.")
        for page in reversed(pages):
            self._references[page] -= 1
            if not self._references[page]:
                if page in self._key_of:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def publish(self, page: int, key: BlockKey) -> None:
        """Declares that referenced `page` is full and immutable under `key`. The first page of a key stays its page."""
        if not self._references[page]:
            raise KVCacheError(f"page {page} has no reference; publish a page while its sequence still holds it.")
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key] = page
            self._key_of[page] = key


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
