"""Algorithm 1: equal to trying every instance, in corner cases and on a thousand instances."""

import math
import random

import pytest

from kvcache.prefix_index import PrefixIndex
from serving.conductor import ClusterMirror
from serving.conductor.errors import ConductorError
from serving.conductor.placement import PrefillCandidate, kvcache_centric, placement_policy
from serving.request import TraceRequest
from tests.serving.conductor.mirrors import COSTS, mirror_of


def request_of(blocks: int) -> TraceRequest:
    return TraceRequest(id="0", arrival_s=0.0, input_tokens=blocks * 512, output_tokens=10, keys=tuple(range(blocks)))


def predicted_s(mirror: ClusterMirror, request: TraceRequest, i: int, matches: list[int], threshold: float) -> float:
    """Algorithm 1's cost of instance `i`, written from the paper."""
    tokens, longest = request.input_tokens, max(matches)
    queue_s = mirror.prefill[i].queue_s(0.0, 0.0)
    if longest > threshold * matches[i]:
        return queue_s + COSTS.transfer_s(longest - matches[i]) + COSTS.prefill_s(tokens, longest)
    return queue_s + COSTS.prefill_s(tokens, matches[i])


@pytest.mark.parametrize("instances", [1, 8, 100, 1000])
@pytest.mark.parametrize("threshold", [1.0, 2.0, 4.0, math.inf])
def test_best_of_all_instances(instances: int, threshold: float) -> None:
    rng = random.Random(instances)
    for _ in range(40):
        blocks = rng.randint(1, 40)
        few = rng.random() < 0.5
        held = [
            range(0 if few and rng.random() < 0.9 else rng.choice([0, 1, 1, 1, blocks // 2, blocks]))
            for _ in range(instances)
        ]
        mirror = mirror_of([rng.choice([0.0, rng.expovariate(0.5)]) for _ in range(instances)], held=held)
        request = request_of(blocks)
        candidate = kvcache_centric(threshold)(mirror, COSTS, request, math.inf, 0.0)
        matches = [min(len(h), blocks) * 512 - (len(h) >= blocks) for h in held]
        best = min(predicted_s(mirror, request, i, matches, threshold) for i in range(instances))
        assert candidate.ttft_s == pytest.approx(best, rel=1e-12)


def place(name: str, mirror: ClusterMirror, blocks: int, threshold: float = 1.0) -> PrefillCandidate:
    return placement_policy(name, threshold=threshold)(mirror, COSTS, request_of(blocks), math.inf, 0.0)


def test_nothing_cached_goes_to_the_shortest_queue_and_fetches_nothing() -> None:
    candidate = place("kvcache_centric", mirror_of([3.0, 1.0], held=[range(0), range(0)]), 8)
    assert (candidate.index, candidate.reused_tokens, candidate.source) == (1, 0, None)


def test_cached_elsewhere_only_is_fetched_at_any_finite_threshold() -> None:
    candidate = place("kvcache_centric", mirror_of([60.0, 0.0], held=[range(8), range(0)]), 8, threshold=1e9)
    assert (candidate.index, candidate.source, candidate.fetched_tokens) == (1, 0, 8 * 512 - 1)


def test_infinite_threshold_never_fetches() -> None:
    candidate = place("cache_aware", mirror_of([60.0, 0.0], held=[range(8), range(0)]), 8)
    assert (candidate.index, candidate.source) == (1, None)


def test_whole_prompt_cached_still_computes_its_last_token() -> None:
    candidate = place("kvcache_centric", mirror_of([0.0], held=[range(8)]), 8)
    assert candidate.reused_tokens == 8 * 512 - 1


def test_congested_sender_is_left_alone_by_the_adaptive_threshold() -> None:
    mirror = mirror_of([60.0, 0.0], held=[range(8), range(0)])
    mirror.links.book(0, 1, 30.0, 0.0)
    assert place("kvcache_centric", mirror, 8).ttft_s > 30
    assert place("kvcache_centric_adaptive", mirror, 8).source is None


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConductorError, match="No placement `best`"):
        placement_policy("best")
    with pytest.raises(ConductorError, match="at least 1"):
        placement_policy("kvcache_centric", threshold=0.5)


def slow_mirror(busy_s: list[float], held: list[tuple[range, range]], slow_token: float) -> ClusterMirror:
    """Instances with a prefix in memory and what follows it on a slow tier."""
    mirror = mirror_of(busy_s)
    mirror.directory, mirror.slow_token = PrefixIndex(2), slow_token
    for i, tiers in enumerate(held):
        for tier, blocks in enumerate(tiers):
            mirror.directory.add(i, blocks, tier=tier)
    return mirror


def test_what_is_on_a_slow_tier_counts_with_the_time_to_read_it() -> None:
    fast, slow = (range(8), range(0)), (range(2), range(2, 8))
    # Reading 6 blocks takes 3 s, which is more than computing 8.
    mirror = slow_mirror([0.1, 0.0], [fast, slow], slow_token=3.0 / (6 * 512))
    candidate = place("cache_aware", mirror, 9)
    assert (candidate.index, candidate.reused_tokens) == (0, 8 * 512)
    assert candidate.ttft_s == pytest.approx(0.1 + COSTS.prefill_s(9 * 512, 8 * 512))
    # Without a queue, equal matches are not equal: memory is faster.
    assert place("cache_aware", slow_mirror([0.0, 0.0], [slow, fast], 3.0 / (6 * 512)), 9).index == 1
    only_slow = place("least_loaded", slow_mirror([0.0], [slow], 3.0 / (6 * 512)), 9)
    assert only_slow.prefill_s == pytest.approx(3.0)
    # Fetched from a peer, it is read there before it can be sent.
    fetched = place("kvcache_centric", slow_mirror([60.0, 0.0], [slow, (range(0), range(0))], 1.0 / (6 * 512)), 9)
    assert (fetched.index, fetched.source) == (1, 0)
    assert fetched.fetch_s == pytest.approx(1.0)
