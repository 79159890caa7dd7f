"""Pages: none lost, none shared by accident, whatever the order of operations."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache.allocator import PageAllocator, PageTable
from kvcache.errors import KVCacheError, OutOfPagesError


def test_no_page_is_lost_over_ten_thousand_random_operations(rng: np.random.Generator) -> None:
    allocator = PageAllocator(64)
    held: list[list[int]] = []
    for _ in range(10_000):
        match rng.integers(4):
            case 0:
                count = int(rng.integers(1, 9))
                if count <= allocator.available:
                    held.append(allocator.allocate(count))
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
    assert sorted(allocator.allocate(64)) == list(range(64))


@settings(max_examples=50)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_lookup_finds_the_longest_published_prefix(published: list[int]) -> None:
    allocator = PageAllocator(8)
    pages = allocator.allocate(4)
    for index in published:
        allocator.publish(pages[index], b"%d" % index)
    longest = next((index for index in range(4) if index not in published), 4)
    assert allocator.lookup(b"%d" % index for index in range(4)) == pages[:longest]


def test_unreferenced_pages_are_reused_least_recent_and_deepest_first() -> None:
    allocator = PageAllocator(4)
    first, second = allocator.allocate(2), allocator.allocate(2)
    for page in (*first, *second):
        allocator.publish(page, b"%d" % page)
    allocator.release(first)
    allocator.release(second)
    assert allocator.cached == 4
    assert allocator.allocate(3) == [first[1], first[0], second[1]]
    assert allocator.lookup([b"%d" % second[0]]) == [second[0]]


def test_misuse_is_refused_and_changes_nothing() -> None:
    allocator = PageAllocator(2)
    (page,) = allocator.allocate(1)
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
        PageAllocator(0)


def test_page_table_has_a_fixed_width() -> None:
    table = PageTable(3)
    table.extend([7, 8])
    with pytest.raises(KVCacheError, match="4 pages do not fit a page table of 3"):
        table.extend([1, 2])
    assert table.pages == [7, 8]
    table.clear()
    assert table.pages == []
