"""Pages: none lost, none shared by accident, whatever the order of operations."""

import collections
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.allocator import PageAllocator, PageTable
from kvcache.errors import KVCacheError, OutOfPagesError
from kvcache.eviction import LFU, LRU, POLICIES, eviction_policy


@pytest.mark.parametrize("policy", POLICIES)
def test_no_page_is_lost_over_random_operations(rng: np.random.Generator, policy: str) -> None:
    allocator = PageAllocator(64, eviction_policy(policy, 64))
    held: list[list[int]] = []
    for _ in range(2_000 if policy != "lru" else 10_000):
        match rng.integers(4):
            case 0:
                count = int(rng.integers(1, 9))
                if count <= allocator.available:
                    held.append(allocator.allocate(count).pages)
                else:
                    with pytest.raises(OutOfPagesError):
                        allocator.allocate(count)
            case 1 if held:
                pages = held[rng.integers(len(held))]
                for index, page in enumerate(pages):
                    allocator.publish(page, b"%d" % (rng.integers(200) + 1000 * index))
            case 2 if held:
                allocator.release(held.pop(int(rng.integers(len(held)))))
            case 3:
                hit = allocator.lookup([b"%d" % (rng.integers(200) + 1000 * index) for index in range(4)])
                if hit:
                    allocator.acquire(hit)
                    held.append(hit)
        references = collections.Counter(page for pages in held for page in pages)
        assert allocator.referenced == len(references)
        assert all(allocator.references(page) == count for page, count in references.items())
    for pages in held:
        allocator.release(pages)
    assert allocator.available == 64
    assert sorted(allocator.allocate(64).pages) == list(range(64))


class LeastRecentlyReleased:
    """Which pages an allocator gives, in as few words as possible: free ones first, else the one released longest ago.

    Attributes:
        free: pages, the last of which is next.
        cached: keys by page in order of release, the deepest page of a sequence first.
        held: [references, key] by page.
    """

    def __init__(self, num_pages: int) -> None:
        self.free = list(reversed(range(num_pages)))
        self.cached: dict[int, bytes] = {}
        self.held: dict[int, list] = {}

    def allocate(self, count: int) -> tuple[list[int], list[tuple[bytes, int]]]:
        pages, evicted = [], []
        for _ in range(count):
            if self.free:
                pages.append(self.free.pop())
            else:
                page, key = next(iter(self.cached.items()))
                del self.cached[page]
                pages.append(page)
                evicted.append((key, page))
        self.held |= {page: [1, None] for page in pages}
        return pages, evicted

    def lookup(self, keys: list[bytes]) -> list[int]:
        page_of = {key: page for page, (_, key) in self.held.items()} | {k: page for page, k in self.cached.items()}
        return [page_of[key] for key in itertools.takewhile(page_of.__contains__, keys)]

    def acquire(self, pages: list[int]) -> None:
        for page in pages:
            if page in self.cached:
                self.held[page] = [0, self.cached.pop(page)]
            self.held[page][0] += 1

    def release(self, pages: list[int]) -> None:
        for page in reversed(pages):
            self.held[page][0] -= 1
            if self.held[page][0] == 0:
                key = self.held.pop(page)[1]
                if key is None:
                    self.free.append(page)
                else:
                    self.cached[page] = key

    def publish(self, page: int, key: bytes) -> None:
        if self.held[page][1] is None and not self.lookup([key]):
            self.held[page][1] = key


def test_lru_gives_the_page_released_longest_ago(rng: np.random.Generator) -> None:
    allocator, model = PageAllocator(48, LRU(48)), LeastRecentlyReleased(48)
    held: list[list[int]] = []
    evictions = 0
    for _ in range(10_000):
        match rng.integers(6):
            case 0 | 5:
                count = int(rng.integers(1, 9))
                if count <= allocator.available:
                    allocation = allocator.allocate(count)
                    assert (allocation.pages, allocation.evicted) == model.allocate(count)
                    held.append(allocation.pages)
                    evictions += len(allocation.evicted)
            case 1 if held:
                for index, page in enumerate(held[rng.integers(len(held))]):
                    key = b"%d" % (rng.integers(200) + 1000 * index)
                    allocator.publish(page, key)
                    model.publish(page, key)
            case 2 | 3 if held:
                pages = held.pop(int(rng.integers(len(held))))
                allocator.release(pages)
                model.release(pages)
            case 4:
                keys = [b"%d" % (rng.integers(200) + 1000 * index) for index in range(4)]
                hit = allocator.lookup(keys)
                assert hit == model.lookup(keys)
                allocator.acquire(hit)
                model.acquire(hit)
                held.append(hit)
        assert (allocator.available, allocator.cached) == (len(model.free) + len(model.cached), len(model.cached))
    assert evictions > 1_000


def test_the_policy_sees_pages_in_use_as_pinned_and_their_end_as_a_use() -> None:
    allocator = PageAllocator(3, LFU(3))
    pages = allocator.allocate(3).pages
    for page in pages:
        allocator.publish(page, b"%d" % page)
        allocator.release([page])
    often = pages[0]
    allocator.acquire([often])
    allocator.release([often])
    assert allocator.allocate(2).pages == pages[1:]
    allocator.acquire([often])
    assert allocator.available == 0
    allocator.release([often])
    assert allocator.allocate(1).evicted == [(b"%d" % often, often)]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_lookup_finds_the_longest_published_prefix(published: list[int]) -> None:
    allocator = PageAllocator(8, LRU(8))
    pages = allocator.allocate(4).pages
    for index in published:
        allocator.publish(pages[index], b"%d" % index)
    longest = next((index for index in range(4) if index not in published), 4)
    assert allocator.lookup(b"%d" % index for index in range(4)) == pages[:longest]


def test_unreferenced_pages_are_reused_least_recent_and_deepest_first() -> None:
    allocator = PageAllocator(4, LRU(4))
    first, second = allocator.allocate(2).pages, allocator.allocate(2).pages
    for page in (*first, *second):
        allocator.publish(page, b"%d" % page)
    allocator.release(first)
    allocator.release(second)
    assert allocator.cached == 4
    allocation = allocator.allocate(3)
    assert allocation.pages == [first[1], first[0], second[1]]
    assert allocation.evicted == [(b"%d" % page, page) for page in allocation.pages]
    assert allocator.lookup([b"%d" % second[0]]) == [second[0]]


def test_misuse_is_refused_and_changes_nothing() -> None:
    allocator = PageAllocator(2, LRU(2))
    (page,) = allocator.allocate(1).pages
    with pytest.raises(OutOfPagesError, match="2 pages asked for, 1 of 2 available"):
        allocator.allocate(2)
    with pytest.raises(KVCacheError, match="released 2 times but has 1"):
        allocator.release([page, page])
    allocator.release([page])
    with pytest.raises(KVCacheError, match="is free"):
        allocator.acquire([page])
    with pytest.raises(KVCacheError, match="no reference"):
        allocator.publish(page, b"key")
    assert allocator.available == 2
    with pytest.raises(KVCacheError, match="at least one page"):
        PageAllocator(0, LRU(1))


def test_page_table_has_a_fixed_width() -> None:
    table = PageTable(3)
    table.extend([7, 8])
    with pytest.raises(KVCacheError, match="4 pages do not fit a page table of 3"):
        table.extend([1, 2])
    assert table.pages == [7, 8]
    table.clear()
    assert table.pages == []
