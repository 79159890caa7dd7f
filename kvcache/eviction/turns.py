"""Our policy: whether and when a conversation goes on depends on how many turns it has had."""

import heapq
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence

from kvcache.eviction.policy import EvictionPolicy, unique
from kvcache.eviction.reuse import ReuseTimes

_TURNS, _FRESH, _USES = 6, 8, 16


class _Group:
    """Blocks of one kind that were last used by one prompt, and so age together.

    Attributes:
        kind: kind of the blocks.
        used_at: time of that use, in seconds.
        keys: the blocks in order of eviction.
        next: index of the first of `keys` that `_next` has not considered.
        age: bin of the time since `used_at`.
        alive: blocks not used since, evicted ones included.
    """

    __slots__ = ("age", "alive", "keys", "kind", "next", "used_at")

    def __init__(self, kind: int, used_at: float) -> None:
        self.kind, self.used_at = kind, used_at
        self.keys: list[Hashable] = []
        self.age = self.next = self.alive = 0


class _Block:
    """History of a block that is present or was evicted not long ago."""

    __slots__ = ("group", "turn", "uses")

    def __init__(self, turn: int) -> None:
        self.turn, self.uses = turn, 0
        self.group: _Group | None = None


class Turns(EvictionPolicy):
    """Evicts the block that earns the fewest hits per second of keeping it, as learned from this very traffic.

    LRU asks only how long ago a block was used. Whether a block is used again depends on its conversation, which goes
    on rarely after a first turn, nearly always after the tenth, and not at all within the seconds that a person reads;
    the partial block at a prompt's end is never used again. A block's kind is, at its last use,

    * its number of uses, for blocks that more prompts share than continue this one (system prompts, documents);
    * otherwise the turn of its prompt (one more than that of the deepest known block) and the number of blocks that
      were new in the prompt; a prompt's last block is a kind of its own.

    `ReuseTimes` learns how the kinds are used again as they age, evicted blocks included for a while, and ranks (kind,
    age) by Gittins index. Before anything is learned, the order is that of LRU.

    Blocks of one kind and prompt are one group, so a use costs O(1) amortised and an eviction O(log(kinds x ages)).
    Times are seconds. `access` sets the kinds; a block inserted or touched singly counts to the prompt before.
    """

    # Uses between two rankings, and blocks remembered after eviction as a multiple of the capacity.
    _RANK_EVERY = 2048
    _MEMORY = 8

    def __init__(self, capacity: int, keep_prefixes: bool = False) -> None:
        super().__init__(capacity, keep_prefixes)
        self._blocks: dict[Hashable, _Block] = {}
        self._first: OrderedDict[Hashable, None] = OrderedDict()
        self._ghosts: deque[tuple[Hashable, _Group]] = deque()
        self._times = ReuseTimes(_USES + _TURNS * (_FRESH + 1))
        self._bins = ReuseTimes.BINS
        self._ends_s: list[float] = self._times.ends_s.tolist()
        self._timers: list[deque[_Group]] = [deque() for _ in range(self._bins)]
        self._cells: dict[int, deque[_Group]] = {}
        self._ranked: list[tuple[float, int]] = []
        self._worth: list[float] = []
        self._rank()
        self._since_ranked = 0
        self._now = 0.0
        self._turn, self._deepest_uses, self._kind, self._last_kind = 0, 0, _USES, _USES
        self._last: Hashable | None = None
        self._open: dict[int, _Group] = {}

    def access(self, path: Sequence[Hashable], now: float) -> None:
        path = unique(path)
        if not path:
            return
        known, deepest = 0, None
        for key in path:
            block = self._blocks.get(key)
            if block is None:
                break
            known, deepest = known + 1, block
        self._turn = min(deepest.turn + 1, _TURNS - 1) if deepest is not None else 0
        self._deepest_uses = deepest.uses if deepest is not None else 0
        fresh = min((len(path) - known).bit_length(), _FRESH - 1)
        self._kind = _USES + self._turn * (_FRESH + 1) + fresh
        self._last_kind = _USES + self._turn * (_FRESH + 1) + _FRESH
        self._last = path[-1]
        self._open.clear()
        super().access(path, now)

    def _enter(self, key: Hashable, now: float, depth: int) -> None:
        self._use(key, now)

    def _use(self, key: Hashable, now: float) -> None:
        if now != self._now:
            self._advance(now)
        if self._since_ranked >= self._RANK_EVERY:
            self._times.fade(self._since_ranked)
            self._rank()
            self._since_ranked = 0
        self._since_ranked += 1
        block = self._blocks.get(key)
        if block is None:
            block = self._blocks[key] = _Block(self._turn)
        elif block.group is not None:
            group = block.group
            group.alive -= 1
            if group.age < self._bins - 1:
                self._times.hits[group.kind, group.age] += 1
        self._first.pop(key, None)
        block.uses += 1
        if block.uses > self._deepest_uses + 1:
            kind = min(block.uses.bit_length(), _USES) - 1
        else:
            kind = self._last_kind if key == self._last else self._kind
        group = self._open.get(kind)
        if group is None or group is block.group:
            group = self._open[kind] = _Group(kind, now)
            self._timers[0].append(group)
            self._queue(group)
        group.keys.append(key)
        group.alive += 1
        block.group = group

    def _queue(self, group: _Group) -> None:
        cell = group.kind * self._bins + group.age
        queue = self._cells.get(cell)
        if queue is None:
            queue = self._cells[cell] = deque()
            heapq.heappush(self._ranked, (self._worth[cell], cell))
        queue.append(group)

    def _advance(self, now: float) -> None:
        """Moves the groups that have aged into their next bins."""
        self._now = now
        self._open.clear()
        for age in range(self._bins - 1):
            timer, end_s = self._timers[age], self._ends_s[age]
            while timer and now - timer[0].used_at >= end_s:
                group = timer.popleft()
                queue = self._cells.get(group.kind * self._bins + age)
                if queue and queue[0] is group:
                    queue.popleft()
                self._times.passed[group.kind, age] += group.alive
                if group.alive:
                    group.age = age + 1
                    self._timers[age + 1].append(group)
                    if group.next < len(group.keys):
                        self._queue(group)
        # The last bin has no end.
        self._timers[-1].clear()

    def _rank(self) -> None:
        self._worth = self._times.worth().ravel().tolist()
        self._cells = {cell: queue for cell, queue in self._cells.items() if queue}
        self._ranked = [(self._worth[cell], cell) for cell in self._cells]
        heapq.heapify(self._ranked)

    def _next(self) -> Hashable | None:
        if self._first:
            return self._first.popitem(last=False)[0]
        while self._ranked:
            cell = self._ranked[0][1]
            queue = self._cells[cell]
            while queue:
                group = queue[0]
                while group.next < len(group.keys):
                    key = group.keys[group.next]
                    group.next += 1
                    if key in self._present and self._blocks[key].group is group:
                        return key
                queue.popleft()
            del self._cells[cell]
            heapq.heappop(self._ranked)
        return None

    def _restore(self, key: Hashable) -> None:
        self._first[key] = None
        self._first.move_to_end(key, last=False)

    def _leave(self, key: Hashable) -> None:
        self._first.pop(key, None)
        self._forget(key)

    def _forget(self, key: Hashable) -> None:
        group = self._blocks.pop(key).group
        if group is not None:
            group.alive -= 1

    def _evicted(self, key: Hashable) -> None:
        group = self._blocks[key].group
        if group is None:
            return
        self._ghosts.append((key, group))
        if len(self._ghosts) > self._MEMORY * self.capacity:
            key, group = self._ghosts.popleft()
            block = self._blocks.get(key)
            if block is not None and block.group is group and key not in self._present:
                self._forget(key)
