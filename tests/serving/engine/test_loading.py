"""Sequences whose KV another tier loads: planned once it is there, and never at the cost of somebody else's pages."""

import collections
import dataclasses
from collections.abc import Sequence as Items

import numpy as np
import pytest

from kvcache.blocks import BlockKey, Namespace, page_keys
from kvcache.layout import KVLayout
from model.sampling_params import SamplingParams
from serving.engine.errors import EngineError
from serving.engine.scheduler import Scheduler
from serving.engine.sequence import Sequence, SequencePhase
from serving.engine.types import EngineConfig
from serving.request import Request

PAGE = 4


@dataclasses.dataclass(frozen=True)
class Load:
    sequence: Sequence
    keys: tuple[BlockKey, ...]
    pages: tuple[int, ...]


class FakeLoader:
    """A tier that holds the KV of `keys`; a load ends when the test says so."""

    def __init__(self) -> None:
        self.keys: set[BlockKey] = set()
        self.loads: list[Load] = []

    def lookup(self, keys: Items[BlockKey]) -> int:
        return next((index for index, key in enumerate(keys) if key not in self.keys), len(keys))

    def load(self, sequence: Sequence, keys: Items[BlockKey], pages: Items[int]) -> None:
        self.loads.append(Load(sequence, tuple(keys), tuple(pages)))

    def hold(self, namespace: Namespace, prompt: Items[int]) -> None:
        self.keys.update(page_keys(prompt, PAGE, namespace.root()))


def make(loader: FakeLoader, held: Items[Items[int]], num_pages: int = 32, **config: int | bool) -> Scheduler:
    """Returns a scheduler and has `loader` hold the KV of each prompt in `held`."""
    layout = KVLayout(num_layers=1, num_pages=num_pages, page_size=PAGE, num_kv_heads=1, head_dim=4)
    sizes = {"page_size": PAGE, "max_batch": 4, "token_budget": 12}
    scheduler = Scheduler(EngineConfig(**(sizes | config)), layout, max_model_len=64, loader=loader)
    for prompt in held:
        loader.hold(scheduler.namespace, prompt)
    return scheduler


def request(name: str, prompt: Items[int], max_tokens: int = 3, **fields: float) -> Request:
    return Request(id=name, prompt=tuple(prompt), sampling=SamplingParams(max_tokens=max_tokens), **fields)


def run_step(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Executes one plan with an imaginary model; returns (id, tokens computed) of everything in it."""
    plan = scheduler.plan()
    work = [(sequence, 1) for sequence in plan.decodes] + list(plan.prefills)
    for sequence, count in work:
        assert sequence.phase in (SequencePhase.PREFILL, SequencePhase.DECODE)
        choosing = sequence.pending == count
        scheduler.computed(sequence, count)
        if choosing:
            sequence.tokens.append(sequence.generated)
            if sequence.generated == sequence.request.sampling.max_tokens:
                scheduler.finish(sequence)
    return [(sequence.request.id, count) for sequence, count in work]


def test_a_loading_sequence_holds_its_pages_and_is_planned_once_it_is_loaded() -> None:
    loader = FakeLoader()
    scheduler = make(loader, [range(8)])
    scheduler.add(request("loads", range(10)))
    scheduler.add(request("computes", range(50, 55), arrival_s=1.0))
    assert run_step(scheduler) == [("computes", 5)]
    (load,) = loader.loads
    assert load.sequence.phase is SequencePhase.LOADING
    assert load.pages == tuple(load.sequence.page_table.pages[:2])
    assert scheduler.allocator.referenced == 3 + 2
    assert run_step(scheduler) == [("computes", 1)]
    scheduler.loaded(load.sequence, 8)
    assert run_step(scheduler) == [("computes", 1), ("loads", 2)]
    assert load.sequence.cached_tokens == 8
    assert (scheduler.prompt_tokens, scheduler.prefix_hit_tokens) == (15, 8)


def test_the_device_is_asked_before_the_tier_and_loaded_pages_are_cached_on_it() -> None:
    loader = FakeLoader()
    scheduler = make(loader, [range(12)])
    scheduler.add(request("first", range(6), max_tokens=1))
    run_step(scheduler)
    scheduler.loaded(loader.loads[0].sequence, 4)
    assert run_step(scheduler) == [("first", 2)]
    scheduler.add(request("second", range(14), max_tokens=1))
    run_step(scheduler)
    # The page that the first request loaded is shared; the other two are loaded.
    assert (len(loader.loads[1].keys), loader.loads[1].sequence.computed) == (2, 4)
    scheduler.loaded(loader.loads[1].sequence, 12)
    scheduler.add(request("third", range(14), max_tokens=1))
    assert run_step(scheduler) == [("second", 2), ("third", 2)]
    assert len(loader.loads) == 2


def test_a_failed_or_short_load_is_computed_instead() -> None:
    loader = FakeLoader()
    for loaded, rest in ((0, 10), (4, 6)):
        scheduler = make(loader, [range(8)])
        scheduler.add(request("a", range(10)))
        assert run_step(scheduler) == []
        scheduler.loaded(loader.loads.pop().sequence, loaded)
        assert run_step(scheduler) == [("a", rest)]


def test_pages_of_an_aborted_load_go_to_nobody_until_it_ends() -> None:
    loader = FakeLoader()
    scheduler = make(loader, [range(8)], num_pages=4)
    scheduler.add(request("a", range(10)))
    run_step(scheduler)
    assert scheduler.abort("a")
    assert not scheduler.abort("a")
    assert scheduler.allocator.referenced == 3
    # The id is free again; there is no room for its pages yet.
    scheduler.add(request("a", range(50, 58)))
    assert run_step(scheduler) == []
    scheduler.loaded(loader.loads[0].sequence, 8)
    assert scheduler.allocator.referenced == 0
    assert scheduler.allocator.cached == 2
    assert run_step(scheduler) == [("a", 8)]
    assert scheduler.prompt_tokens == 8


def test_a_loading_sequence_is_not_preempted() -> None:
    loader = FakeLoader()
    scheduler = make(loader, [range(8)], num_pages=6)
    scheduler.add(request("decodes", range(50, 54), max_tokens=12))
    run_step(scheduler)
    scheduler.add(request("loads", range(10), arrival_s=1.0))
    for _ in range(9):
        run_step(scheduler)
    # The later one would be the victim, but its pages are being written: the decoding one waits instead.
    assert scheduler.preemptions == 1
    assert [sequence.request.id for sequence in scheduler.running] == ["loads"]
    assert loader.loads[0].sequence.phase is SequencePhase.LOADING
    scheduler.loaded(loader.loads[0].sequence, 8)
    while scheduler.running or scheduler.waiting:
        assert run_step(scheduler)
    assert scheduler.allocator.available == 6


def test_a_load_ends_once_and_within_its_sequence() -> None:
    loader = FakeLoader()
    scheduler = make(loader, [range(8)])
    scheduler.add(request("a", range(10)))
    run_step(scheduler)
    sequence = loader.loads[0].sequence
    with pytest.raises(EngineError, match="10 tokens of request 'a' cannot be loaded: 0 of 10"):
        scheduler.loaded(sequence, 10)
    scheduler.loaded(sequence, 8)
    with pytest.raises(EngineError, match="'a' is in phase PREFILL, not LOADING"):
        scheduler.loaded(sequence, 8)


def test_no_page_is_written_by_a_load_and_held_by_another(rng: np.random.Generator) -> None:
    loader = FakeLoader()
    texts = [tuple(rng.integers(0, 50, 40).tolist()) for _ in range(4)]
    scheduler = make(loader, [text[:24] for text in texts], num_pages=24)
    alive: set[str] = set()
    for index in range(3000):
        match rng.integers(5):
            case 0:
                prompt = texts[rng.integers(4)][: rng.integers(1, 40)]
                name = f"r{index}"
                scheduler.add(request(name, prompt, int(rng.integers(1, 20)), arrival_s=float(index)))
                alive.add(name)
            case 1 if alive:
                scheduler.abort(sorted(alive)[rng.integers(len(alive))])
            case 2 if loader.loads:
                load = loader.loads.pop(int(rng.integers(len(loader.loads))))
                before = load.sequence.computed
                scheduler.loaded(load.sequence, before + PAGE * int(rng.integers(len(load.keys) + 1)))
            case _:
                run_step(scheduler)
        running = scheduler.running
        alive = {sequence.request.id for sequence in (*running, *scheduler.waiting)}
        aborted = [load.sequence for load in loader.loads if load.sequence not in running]
        holders = collections.Counter(page for s in (*running, *aborted) for page in s.page_table.pages)
        assert scheduler.allocator.referenced == len(holders)
        assert all(holders[page] == 1 for load in loader.loads for page in load.pages)
    for load in loader.loads:
        scheduler.loaded(load.sequence, load.sequence.computed)
    for name in alive:
        scheduler.abort(name)
    assert scheduler.allocator.available == 24


def test_a_deterministic_engine_loads_and_keeps_whole_chunks_only() -> None:
    loader = FakeLoader()
    scheduler = make(loader, [range(20), range(50, 58)], deterministic=True)
    scheduler.add(request("a chunk and more", range(22), max_tokens=1))
    scheduler.add(request("less than a chunk", range(50, 60), max_tokens=1, arrival_s=1.0))
    assert run_step(scheduler) == [("less than a chunk", 10)]
    (load,) = loader.loads
    assert len(load.keys) == 3
    scheduler.loaded(load.sequence, 8)  # the chunk is short of a page: all of it is computed
    assert run_step(scheduler) == [("a chunk and more", 12)]
    assert run_step(scheduler) == [("a chunk and more", 10)]


def test_a_deterministic_engine_resumes_by_decode_steps_behind_a_prompt_that_was_loaded() -> None:
    loader = FakeLoader()
    scheduler = make(loader, [range(24)], deterministic=True)
    scheduler.add(request("resumed", range(24), max_tokens=5), emitted=(7, 8))
    assert run_step(scheduler) == []
    (load,) = loader.loads
    scheduler.loaded(load.sequence, 24)
    assert load.sequence.phase is SequencePhase.DECODE
    assert [run_step(scheduler) for _ in range(4)] == [[("resumed", 1)]] * 4
    assert not scheduler.running
