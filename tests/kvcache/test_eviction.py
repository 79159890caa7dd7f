"""Every policy keeps the promises of the interface; those with a plain definition equal it; none passes the optimum."""

import itertools
import random
from collections.abc import Hashable, Sequence

import pytest

from kvcache.errors import KVCacheError
from kvcache.eviction import FIFO, LFU, LRU, POLICIES, Belady, EvictionPolicy, eviction_policy


def conversations(seed: int, count: int) -> list[list[int]]:
    """Prompts that continue earlier ones, share a first block, or never come back."""
    rng = random.Random(seed)
    fresh = itertools.count(1)
    known: list[list[int]] = [[0]]
    paths = []
    for _ in range(count):
        start = rng.choice(known[-30:]) if rng.random() < 0.6 else [0]
        path = [*start, *(next(fresh) for _ in range(rng.randint(0, 5)))]
        known.append(path)
        paths.append(path)
    return paths


def hits(policy: EvictionPolicy, paths: Sequence[Sequence[Hashable]]) -> int:
    """Blocks of longest present prefixes, with `policy.capacity` blocks kept between prompts."""
    total = 0
    for now, path in enumerate(paths):
        total += len(list(itertools.takewhile(policy.__contains__, path)))
        policy.admit(path, float(now))
    return total


@pytest.mark.parametrize("name", POLICIES)
def test_ten_thousand_operations(name: str) -> None:
    """Present = inserted - evicted - removed; pinned blocks stay; the limit holds once unpinned blocks may leave."""
    rng = random.Random(1)
    policy = eviction_policy(name, 60)
    present: set[Hashable] = set()
    parents: dict[Hashable, Hashable | None] = {}
    pinned: list[Hashable] = []
    paths = iter(conversations(2, 10_000))
    for step in range(10_000):
        now = step * 0.7
        draw = rng.random()
        if draw < 0.5:
            path = next(paths)
            policy.access(path, now)
            for parent, key in itertools.pairwise([None, *path]):
                if key not in present:
                    parents[key] = parent
            present.update(path)
        elif draw < 0.6 and present:
            policy.touch(rng.choice(sorted(present)), now)
        elif draw < 0.7 and present and len(pinned) < 20:
            pinned.append(rng.choice(sorted(present)))
            policy.pin(pinned[-1])
        elif draw < 0.8 and pinned:
            policy.unpin(pinned.pop(rng.randrange(len(pinned))))
        elif draw < 0.83 and (loose := sorted(present - set(pinned) - {parents[key] for key in present})):
            key = rng.choice(loose)
            policy.remove(key)
            present.remove(key)
        elif present and len(policy) > 40:
            _evict(policy, present, parents, pinned)
        while len(policy) > policy.capacity:
            _evict(policy, present, parents, pinned)
        assert len(policy) == len(present) <= policy.capacity
        if step % 500 == 0:
            assert set(policy) == present
    for key in pinned:
        policy.unpin(key)
    while len(policy):
        _evict(policy, present, parents, [])
    assert not present


def _evict(
    policy: EvictionPolicy,
    present: set[Hashable],
    parents: dict[Hashable, Hashable | None],
    pinned: list[Hashable],
) -> None:
    """Evicts one block that may leave; where there is none, sees that refused, and unpins one more until there is."""
    continued = {parents[key] for key in present} if policy.keep_prefixes else set()
    while not (allowed := present - continued - set(pinned)):
        with pytest.raises(KVCacheError, match="can be evicted"):
            policy.evict()
        policy.unpin(pinned.pop())
    key = policy.evict()
    assert key in allowed
    present.remove(key)


class Plain:
    """FIFO, LRU, LFU and Belady as they are defined: the victim is the minimum of a number over all blocks."""

    def __init__(self, rule: str, capacity: int, paths: Sequence[Sequence[int]]) -> None:
        self.rule, self.capacity, self.paths = rule, capacity, paths
        self.came: dict[int, int] = {}
        self.used: dict[int, int] = {}
        self.uses: dict[int, int] = {}
        self.clock = itertools.count()

    def access(self, number: int) -> list[int]:
        for key in reversed(self.paths[number]):
            now = next(self.clock)
            self.came.setdefault(key, now)
            self.used[key] = now
            self.uses[key] = self.uses.get(key, 0) + 1
        gone = []
        while len(self.came) > self.capacity:
            key = min(self.came, key=lambda key: self._rank(key, number))
            gone.append(key)
            for table in (self.came, self.used, self.uses):
                del table[key]
        return gone

    def _rank(self, key: int, number: int) -> tuple[int, int]:
        if self.rule == "fifo":
            return (self.came[key], 0)
        if self.rule == "lru":
            return (self.used[key], 0)
        if self.rule == "lfu":
            return (self.uses[key], self.used[key])
        later = (n for n in range(number + 1, len(self.paths)) if key in self.paths[n])
        return (-next(later, len(self.paths)), self.used[key])


@pytest.mark.parametrize("rule", ["fifo", "lru", "lfu", "belady"])
@pytest.mark.parametrize("capacity", [1, 7, 40])
def test_evicts_what_the_definition_says(rule: str, capacity: int) -> None:
    paths = conversations(3, 150 if rule == "belady" else 600)
    policies: dict[str, EvictionPolicy] = {
        "fifo": FIFO(capacity),
        "lru": LRU(capacity),
        "lfu": LFU(capacity),
        "belady": Belady(capacity, paths),
    }
    policy, plain = policies[rule], Plain(rule, capacity, paths)
    for number, path in enumerate(paths):
        policy.access(path, float(number))
        gone = [policy.evict() for _ in range(len(policy) - capacity)]
        assert gone == plain.access(number)


def plain_sieve(keys: Sequence[int], capacity: int) -> list[list[int]]:
    """What SIEVE evicts for each key, from a list with a hand on it, as the paper draws it."""
    queue: list[int] = []  # The oldest first.
    visited: dict[int, bool] = {}
    hand, gone = 0, []
    for key in keys:
        victims = []
        if key in visited:
            visited[key] = True
        else:
            if len(queue) == capacity:
                while visited[queue[hand := hand % len(queue)]]:
                    visited[queue[hand]] = False
                    hand += 1
                victims = [queue.pop(hand)]
                del visited[victims[0]]
            queue.append(key)
            visited[key] = False
        gone.append(victims)
    return gone


@pytest.mark.parametrize("capacity", [1, 5, 40])
def test_sieve_is_the_paper_s(capacity: int) -> None:
    rng = random.Random(capacity)
    keys = [int(rng.paretovariate(0.7)) % 500 for _ in range(5000)]
    policy = eviction_policy("sieve", capacity)
    assert [policy.admit([key], float(now)) for now, key in enumerate(keys)] == plain_sieve(keys, capacity)


@pytest.mark.parametrize("name", POLICIES)
def test_a_prompt_never_evicts_itself_where_blocks_are_replaced(name: str) -> None:
    policy, present = eviction_policy(name, 12), set()
    for now, path in enumerate(conversations(8, 2000)):
        evicted = policy.admit(path, float(now))
        assert len(set(evicted)) == len(evicted)
        assert set(evicted) <= present | set(path)
        present = (present | set(path)) - set(evicted)
        if name.removesuffix("+prefix") in ("sieve", "s3fifo", "arc"):
            assert not set(evicted) & set(path[:12])
            assert present >= set(path[:12])
            present -= set(path[12:]) - set(policy)
        assert set(policy) == present
        assert len(policy) <= 12


@pytest.mark.parametrize("seed", range(4))
def test_no_policy_passes_the_optimum(seed: int) -> None:
    paths = conversations(seed, 500)
    for capacity in (5, 30, 150, 600):
        best = hits(Belady(capacity, paths), paths)
        for name in POLICIES:
            assert hits(eviction_policy(name, capacity), paths) <= best, (name, capacity)


@pytest.mark.parametrize("name", POLICIES)
def test_all_fits_all_hits(name: str) -> None:
    """Where nothing needs to be evicted, every policy hits what an infinite cache hits."""
    paths = conversations(5, 300)
    blocks = len({key for path in paths for key in path})
    assert hits(eviction_policy(name, blocks), paths) == hits(Belady(blocks, paths), paths)


def test_wrong_use_says_what_to_do() -> None:
    policy = LRU(2)
    policy.insert("a", 0.0)
    for call, words in (
        (lambda: policy.insert("a", 1.0), "`touch` it"),
        (lambda: policy.touch("b", 1.0), "`insert` it"),
        (lambda: policy.remove("b"), "cannot be removed"),
        (lambda: policy.unpin("a"), "not pinned"),
        (lambda: eviction_policy("lru", 0), "at least one"),
        (lambda: eviction_policy("belady", 5), "known: lru"),
    ):
        with pytest.raises(KVCacheError, match=words):
            call()
    policy.pin("a")
    with pytest.raises(KVCacheError, match="unpin one"):
        policy.evict()
    policy.unpin("a")
    assert policy.evict() == "a"
