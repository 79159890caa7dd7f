"""Prefill placement: Algorithm 1 of Mooncake with both branches, its baselines, and `marginal`, our own.

Corner cases that the paper leaves open are decided so. No block cached anywhere: the local branch. Cached elsewhere but
not here: the ratio is infinite, so the transfer branch at any finite threshold. The best holder itself: ratio 1, local.
A threshold of infinity never transfers (that is `cache_aware`). A prompt that is cached whole still computes its last
token. Ties go to the longest local match; without one, to the instance that has been idle longest.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterator

from kvcache.prefix_index import members
from serving.conductor.errors import ConductorError
from serving.conductor.estimators import TimeModel
from serving.conductor.mirror import ClusterMirror, PrefillMirror
from serving.request import Request

# Groups of equal match up to this size are tried whole. Of larger ones the least loaded wins, unless a queue reorders
# or a NIC is busy; so many of the least loaded are tried.
_FEW = 16
# Holders of a prefix that a fetch may come from.
_SOURCES = 4


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCandidate:
    """A prefill instance and what it would do: see `Placement` for the fields."""

    index: int
    reused_tokens: int
    source: int | None
    fetched_tokens: int
    queue_s: float
    fetch_s: float
    prefill_s: float
    ttft_s: float

    @classmethod
    def local(cls, index: int, reused_tokens: int, queue_s: float, prefill_s: float) -> "PrefillCandidate":
        """An instance that fetches nothing."""
        return cls(
            index=index,
            reused_tokens=reused_tokens,
            source=None,
            fetched_tokens=0,
            queue_s=queue_s,
            fetch_s=0.0,
            prefill_s=prefill_s,
            ttft_s=queue_s + prefill_s,
        )


# (mirror, costs, request, queue_key, now) -> PrefillCandidate
PlacementPolicy = Callable[[ClusterMirror, TimeModel, Request, float, float], PrefillCandidate]


def _no_read_s(index: int, tokens: int) -> float:
    """Where nothing is on a slow tier."""
    del index, tokens
    return 0.0


def _slow_reads(mirror: ClusterMirror, request: Request) -> Callable[[int, int], float]:
    """Seconds that a holder takes to read its first so many tokens, as far as they are on its slow tier.

    A holder has the beginning of a prompt in its fast tier, for that was used by more prompts; what is behind the first
    gap counts as slow.
    """
    if not mirror.slow_token:
        return _no_read_s
    fast = mirror.directory.match(request.keys, tier=0)

    def read_s(index: int, tokens: int) -> float:
        for depth, mask in fast:
            if mask >> index & 1:
                return max(0, tokens - depth * mirror.block_size) * mirror.slow_token
        return tokens * mirror.slow_token

    return read_s


def _local(
    mirror: ClusterMirror, costs: TimeModel, request: Request, queue_key: float, now: float, i: int
) -> PrefillCandidate:
    """Instance `i` with whatever prefix it holds itself."""
    bit, blocks = 1 << i, 0
    for depth, mask in mirror.directory.match(request.keys):
        if mask & bit:
            blocks = depth
            break
    reused = min(blocks * mirror.block_size, request.input_tokens - 1)
    prefill_s = max(costs.prefill_s(request.input_tokens, reused), _slow_reads(mirror, request)(i, reused))
    return PrefillCandidate.local(i, reused, mirror.prefill[i].queue_s(now, queue_key), prefill_s)


def random_placement(seed: int) -> PlacementPolicy:
    """Any instance."""
    rng = random.Random(seed)

    def choose(
        mirror: ClusterMirror, costs: TimeModel, request: Request, queue_key: float, now: float
    ) -> PrefillCandidate:
        live = mirror.prefill_order
        _, index = next(itertools.islice(live, rng.randrange(len(live)), None))
        return _local(mirror, costs, request, queue_key, now, index)

    return choose


def least_loaded(
    mirror: ClusterMirror, costs: TimeModel, request: Request, queue_key: float, now: float
) -> PrefillCandidate:
    """The shortest queue, whatever it has cached."""
    return _local(mirror, costs, request, queue_key, now, next(iter(mirror.prefill_order))[1])


def kvcache_centric(threshold: float, adaptive: bool = False) -> PlacementPolicy:
    """Algorithm 1: the least predicted TTFT, over local recomputation and over fetching the longest cached prefix.

    `threshold` is the paper's kvcache_balancing_threshold: the longest match anywhere over the local one, beyond which
    the missing part is fetched. `adaptive` costs both branches on every instance instead, which is the best threshold
    for each request; the fetch then runs while the request queues.
    """
    if not threshold >= 1:
        raise ConductorError(f"The balancing threshold is {threshold}; it is a ratio of match lengths, so at least 1.")

    def choose(
        mirror: ClusterMirror, costs: TimeModel, request: Request, queue_key: float, now: float
    ) -> PrefillCandidate:
        return _Search(mirror, costs, request, queue_key, now).best(threshold, adaptive, 0.0)

    return choose


def marginal(longest_pressure: float = 4.0) -> PlacementPolicy:
    """Ours: least TTFT plus the delay that the request's own work causes to those behind it.

    A second of prefill computed on a busy instance is waited for by everyone queued after it, so cached prefixes are
    worth more than the requester's own time when queues are long. The weight is the running mean of queueing over
    execution (0 when idle: then it is Algorithm 1 with the adaptive threshold), at most `longest_pressure`.
    """
    pressure = 0.0

    def choose(
        mirror: ClusterMirror, costs: TimeModel, request: Request, queue_key: float, now: float
    ) -> PrefillCandidate:
        nonlocal pressure
        candidate = _Search(mirror, costs, request, queue_key, now).best(1.0, True, pressure)
        queued = min(longest_pressure, max(0.0, candidate.ttft_s / candidate.prefill_s - 1))
        pressure += (queued - pressure) * 0.02
        return candidate

    return choose


class _Search:
    """One request's candidates: few enough to look at, yet never missing the best."""

    __slots__ = ("costs", "groups", "holders", "mirror", "now", "queue_key", "read_s", "request")

    def __init__(self, mirror: ClusterMirror, costs: TimeModel, request: Request, queue_key: float, now: float) -> None:
        self.mirror, self.costs, self.request, self.queue_key, self.now = mirror, costs, request, queue_key, now
        live = mirror.prefill_order
        cap = request.input_tokens - 1
        self.groups = [
            (min(depth * mirror.block_size, cap), mask) for depth, mask in mirror.directory.match(request.keys) if live
        ]
        self.read_s = _slow_reads(mirror, request)
        self.holders = [*itertools.islice(members(self.groups[0][1]), _SOURCES)] if self.groups else []

    def candidates(self) -> Iterator[tuple[int, int]]:
        """(instance, matched tokens), the longest match first.

        Instances of equal match, none included, differ by their queue alone, so of a large group only the least loaded
        count. (By their slow tiers too, but of a large group that is not searched for.)
        """
        live, matched = self.mirror.prefill_order, 0
        for tokens, mask in self.groups:
            matched |= mask
            if mask.bit_count() > _FEW:
                chosen = itertools.islice(live.among(mask), _FEW)
            else:
                chosen = (index for index in members(mask) if index in live)
            for index in chosen:
                yield index, tokens
        for index in itertools.islice(live.among(~matched), _FEW):
            yield index, 0

    def source(self, instance: PrefillMirror) -> tuple[int, float]:
        """The holder of the longest match whose NIC is free first, of the first few, and the wait for it."""
        wait_s, index = min(
            (self.mirror.fetch_wait_s(instance.index, index, self.now), index) for index in self.holders
        )
        return index, wait_s

    def fetch_s(self, instance: PrefillMirror, matched: int, longest: int) -> tuple[int, float]:
        """The holder to fetch what follows the local match from, and the seconds until that is here."""
        source, wait_s = self.source(instance)
        sent_s = wait_s + self.costs.transfer_s(longest - matched)
        # It sends layer by layer as it reads.
        return source, max(sent_s, self.read_s(source, longest) - self.read_s(source, matched))

    def best(self, threshold: float, adaptive: bool, pressure: float) -> PrefillCandidate:
        tokens, prefill, costs = self.request.input_tokens, self.mirror.prefill, self.costs
        longest = self.groups[0][0] if self.groups else 0
        whole_s = costs.prefill_s(tokens, longest)
        least, found = math.inf, None
        for index, matched in self.candidates():
            instance = prefill[index]
            queue_s = instance.queue_s(self.now, self.queue_key)
            fetch = longest > matched and (adaptive or longest > threshold * matched)
            if not fetch or adaptive:
                prefill_s = max(costs.prefill_s(tokens, matched), self.read_s(index, matched))
                cost = queue_s + prefill_s * (1 + pressure)
                if cost < least:
                    least, found = cost, PrefillCandidate.local(index, matched, queue_s, prefill_s)
            if fetch and queue_s + whole_s * (1 + pressure) < least:
                source, fetch_s = self.fetch_s(instance, matched, longest)
                ready_s = max(queue_s, fetch_s) if adaptive else queue_s + fetch_s
                prefill_s = max(whole_s, self.read_s(index, matched))
                cost = ready_s + prefill_s * (1 + pressure)
                if cost < least:
                    least = cost
                    found = PrefillCandidate(
                        index=index,
                        reused_tokens=longest,
                        source=source,
                        fetched_tokens=longest - matched,
                        queue_s=queue_s,
                        fetch_s=fetch_s,
                        prefill_s=prefill_s,
                        ttft_s=ready_s + prefill_s,
                    )
        if found is None:
            raise ConductorError("No prefill instance is left; add one before scheduling.")
        return found


def placement_policy(name: str, *, threshold: float = 1.0, seed: int = 0) -> PlacementPolicy:
    """The policy called `name`, one of `PLACEMENTS`."""
    policies: dict[str, Callable[[], PlacementPolicy]] = {
        "random": lambda: random_placement(seed),
        "least_loaded": lambda: least_loaded,
        "cache_aware": lambda: kvcache_centric(math.inf),
        "kvcache_centric": lambda: kvcache_centric(threshold),
        "kvcache_centric_adaptive": lambda: kvcache_centric(1.0, adaptive=True),
        "marginal": marginal,
    }
    if name not in policies:
        raise ConductorError(f"No placement `{name}`; known: {', '.join(PLACEMENTS)}.")
    return policies[name]()


PLACEMENTS = ("random", "least_loaded", "cache_aware", "kvcache_centric", "kvcache_centric_adaptive", "marginal")
