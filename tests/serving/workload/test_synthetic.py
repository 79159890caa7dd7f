"""Synthetic workloads have the rates, lengths and hit rates that were asked for; the same seed, the same workload."""

import numpy as np
import pytest

from serving.workload.errors import TraceError
from serving.workload.requests import Trace
from serving.workload.synthetic import Lengths, LoadPhase, arrivals, chat, documents, phased, prefix_tree


def unlimited_hit_rate(trace: Trace) -> float:
    """Hit blocks over all blocks with a cache that forgets nothing."""
    seen: set[int] = set()
    hits = total = 0
    for request in trace.requests:
        hits += sum(block in seen for block in request.keys)
        total += len(request.keys)
        seen.update(request.keys)
    return hits / total


@pytest.mark.parametrize("cv", [0.0, 0.5, 1.0, 3.0])
def test_arrivals_have_their_rate_and_variation(rng: np.random.Generator, cv: float) -> None:
    gaps = np.diff(arrivals(20_000, 5.0, rng, cv))
    # Three standard errors of the mean; the variation itself is heavier tailed.
    assert gaps.mean() == pytest.approx(0.2, rel=max(1e-9, 3 * cv / 20_000**0.5))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1, abs=1e-9)


def test_lengths_have_their_mean_and_bounds(rng: np.random.Generator) -> None:
    drawn = Lengths(1000, cv=0.5, low=100, high=100_000).draw(20_000, rng)
    assert drawn.mean() == pytest.approx(1000, rel=0.02)
    assert drawn.std() == pytest.approx(500, rel=0.05)
    assert set(Lengths(7).draw(10, rng)) == {7}


@pytest.mark.parametrize("hit_rate", [0.0, 0.3, 0.5, 0.8])
def test_prefix_trees_reach_their_hit_rate(rng: np.random.Generator, hit_rate: float) -> None:
    inputs, outputs = Lengths(8000, cv=0.8, low=600), Lengths(200, cv=1.0)
    trace = prefix_tree(arrivals(3000, 4.0, rng), inputs, outputs, hit_rate, seed=1)
    assert unlimited_hit_rate(trace) == pytest.approx(hit_rate, abs=0.02)
    assert trace == prefix_tree(np.array([r.arrival_s for r in trace.requests]), inputs, outputs, hit_rate, seed=1)


def make_chat(seed: int = 0) -> Trace:
    return chat(
        60,
        session_rate=2.0,
        turns=4.0,
        think_s=5.0,
        system=Lengths(1500),
        question=Lengths(300, cv=1.0),
        answer=Lengths(250, cv=1.0),
        seed=seed,
    )


def test_chats_repeat_their_history() -> None:
    trace = make_chat()
    assert trace == make_chat()
    assert trace != make_chat(seed=1)
    assert [request.id for request in trace.requests] == [str(i) for i in range(len(trace.requests))]
    for request in trace.requests:
        assert len(request.keys) == -(-request.input_tokens // trace.block_size)
    # An id stands for a whole prefix: wherever it appears, the same ids come before it.
    before: dict[int, tuple[int, ...]] = {}
    for request in trace.requests:
        for position, block in enumerate(request.keys):
            assert before.setdefault(block, request.keys[:position]) == request.keys[:position]
    assert 0.3 < unlimited_hit_rate(trace) < 0.95


def test_impossible_workloads_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(TraceError, match="not possible"):
        Lengths(5, low=10)
    with pytest.raises(TraceError, match="rate 0"):
        arrivals(5, 0, rng)
    with pytest.raises(TraceError, match="`hit_rate` 1"):
        prefix_tree(np.zeros(3), Lengths(5), Lengths(5), 1.0, seed=0)


def test_phases_follow_one_another_with_their_own_rates_and_lengths() -> None:
    first, second = LoadPhase(100.0, 20.0, Lengths(1000), Lengths(10)), LoadPhase(50.0, 5.0, Lengths(10), Lengths(300))
    trace = phased([first, second], seed=1)
    assert trace == phased([first, second], seed=1) != phased([first, second], seed=2)
    early = [request for request in trace.requests if request.arrival_s < 100.0]
    late = trace.requests[len(early) :]
    # Three standard deviations of a Poisson count.
    assert len(early) == pytest.approx(2000, abs=3 * 2000**0.5)
    assert len(late) == pytest.approx(250, abs=3 * 250**0.5)
    assert {(r.input_tokens, r.output_tokens) for r in early} == {(1000, 10)}
    assert {(r.input_tokens, r.output_tokens) for r in late} == {(10, 300)}
    arrivals_s = [request.arrival_s for request in trace.requests]
    assert arrivals_s == sorted(arrivals_s)
    assert arrivals_s[-1] < 150.0


def test_phases_that_bring_nothing_are_refused() -> None:
    with pytest.raises(TraceError, match="bring no request"):
        phased([LoadPhase(1e-9, 1.0, Lengths(10), Lengths(10))], seed=0)
    with pytest.raises(TraceError, match="must be above 0"):
        LoadPhase(0.0, 1.0, Lengths(10), Lengths(10))


def test_documents_are_asked_for_by_popularity() -> None:
    trace = documents(
        20_000, rate=5.0, count=50, zipf=1.0, document=Lengths(2048), question=Lengths(300), answer=Lengths(9), seed=3
    )
    asked = np.unique([request.keys[0] for request in trace.requests], return_counts=True)[1]
    shares = 1 / np.arange(1, 51)
    np.testing.assert_allclose(asked / 20_000, shares / shares.sum(), atol=0.01)
    assert {(r.input_tokens, r.output_tokens, len(r.keys)) for r in trace.requests} == {(2348, 9, 5)}
    assert len({request.keys[-1] for request in trace.requests}) == 20_000
    assert trace.duration_s == pytest.approx(4000, rel=0.05)
    with pytest.raises(TraceError, match="zipf -1"):
        documents(1, rate=1, count=1, zipf=-1, document=Lengths(9), question=Lengths(9), answer=Lengths(9), seed=0)
