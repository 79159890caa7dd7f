"""The bitmask directory finds, for every instance, the match that a walk over its own set finds."""

import itertools
import random

import pytest

from kvcache.errors import KVCacheError
from kvcache.prefix_index import PrefixIndex, members


def test_match_equals_brute_force_on_random_prompts() -> None:
    rng = random.Random(0)
    instances = 70
    directory = PrefixIndex()
    held: list[set[int]] = [set() for _ in range(instances)]
    for _ in range(10_000):
        start = rng.randrange(40)
        prompt = list(range(start * 100, start * 100 + rng.randint(0, 12)))
        if rng.random() < 0.3:
            rng.shuffle(prompt)
        matches = {i: depth for depth, mask in directory.match(prompt) for i in members(mask)}
        for i in rng.sample(range(instances), 5):
            expected = len(list(itertools.takewhile(held[i].__contains__, prompt)))
            assert matches.get(i, 0) == expected
        owner = rng.randrange(instances)
        if rng.random() < 0.6:
            directory.add(owner, prompt)
            held[owner].update(prompt)
        else:
            directory.remove(owner, prompt)
            held[owner].difference_update(prompt)
    assert len(directory) == len(set().union(*held))


@pytest.mark.parametrize(("tiers", "owners"), [(1, 3), (2, 1), (3, 70)])
def test_tiers_and_owners_equal_sets_of_blocks(tiers: int, owners: int) -> None:
    """Every answer of the index from one set of blocks per owner and tier, over random changes."""
    rng = random.Random(tiers)
    index = PrefixIndex(tiers)
    held = [[set[int]() for _ in range(tiers)] for _ in range(owners)]
    for _ in range(1500):
        start = rng.randrange(20) * 100
        prompt = list(range(start, start + rng.randint(1, 10)))
        owner, tier = rng.randrange(owners), rng.randrange(tiers)
        if rng.random() < 0.6:
            part = prompt[rng.randrange(len(prompt)) :]
            index.add(owner, iter(part), tier)
            held[owner][tier].update(part)
        else:
            everywhere = rng.random() < 0.3
            index.remove(owner, iter(prompt), None if everywhere else tier)
            for blocks in held[owner] if everywhere else [held[owner][tier]]:
                blocks.difference_update(prompt)
        asked = rng.choice([None, *range(tiers)])
        of = [set().union(*sets) if asked is None else sets[asked] for sets in held]
        depths = [len([*itertools.takewhile(blocks.__contains__, prompt)]) for blocks in of]
        groups = index.match(prompt, asked)
        assert [depth for depth, _ in groups] == sorted({*depths} - {0}, reverse=True)
        matched = {i: depth for depth, mask in groups for i in members(mask)}
        assert matched == {i: depth for i, depth in enumerate(depths) if depth}
        assert [*members(index.holders(prompt[-1], asked))] == [
            i for i, blocks in enumerate(of) if prompt[-1] in blocks
        ]
    assert len(index) == len(set[int]().union(*(blocks for sets in held for blocks in sets)))


def test_an_index_without_a_tier_is_refused() -> None:
    with pytest.raises(KVCacheError, match="`tiers` is 0"):
        PrefixIndex(0)


def test_groups_come_longest_first_and_are_disjoint() -> None:
    directory = PrefixIndex()
    directory.add(0, [1, 2, 3])
    directory.add(1, [1])
    directory.add(2, [2, 3])
    assert directory.match([1, 2, 3, 4]) == [(3, 0b001), (1, 0b010)]
    assert directory.match([]) == []
    assert directory.match([9]) == []
