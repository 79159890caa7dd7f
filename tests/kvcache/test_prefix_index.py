"""The bitmask directory finds, for every instance, the match that a walk over its own set finds."""

import itertools
import random

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


def test_groups_come_longest_first_and_are_disjoint() -> None:
    directory = PrefixIndex()
    directory.add(0, [1, 2, 3])
    directory.add(1, [1])
    directory.add(2, [2, 3])
    assert directory.match([1, 2, 3, 4]) == [(3, 0b001), (1, 0b010)]
    assert directory.match([]) == []
    assert directory.match([9]) == []
