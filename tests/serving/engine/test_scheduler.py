"""Scheduling without a model: order, chunking, preemption, reuse, conservation."""

import dataclasses
import zlib

import numpy as np
import pytest

from kvcache.blocks import Namespace, page_keys
from kvcache.layout import KVLayout
from model.sampling import SamplingParams
from serving.engine.errors import EngineError, RequestRefusedError
from serving.engine.scheduler import Scheduler, StepPlan
from serving.engine.types import EngineConfig
from serving.request import Request


def make(num_pages: int = 16, max_model_len: int = 64, **config: int | bool) -> Scheduler:
    layout = KVLayout(num_layers=1, num_pages=num_pages, page_size=4, num_kv_heads=1, head_dim=4)
    defaults = {"page_size": 4, "max_batch": 4, "token_budget": 12}
    return Scheduler(EngineConfig(**(defaults | config)), layout, max_model_len=max_model_len)


def request(name: str, prompt: int = 6, max_tokens: int = 4, **fields: int | float | str) -> Request:
    tokens = tuple(zlib.crc32(name.encode()) % 97 + index for index in range(prompt))
    return Request(id=name, prompt=tokens, sampling=SamplingParams(max_tokens=max_tokens), **fields)


def run_step(scheduler: Scheduler) -> list[str]:
    """Plans and executes one step; returns the ids that got a token."""
    return finish_step(scheduler, scheduler.plan())


def finish_step(scheduler: Scheduler, plan: StepPlan) -> list[str]:
    """Executes a plan with an imaginary model; returns the ids that got a token."""
    got = []
    for sequence, count in [(s, 1) for s in plan.decodes] + list(plan.prefills):
        choosing = sequence.pending == count
        scheduler.computed(sequence, count)
        if choosing:
            sequence.tokens.append(sequence.generated)
            got.append(sequence.request.id)
            if sequence.generated == sequence.request.sampling.max_tokens:
                scheduler.finish(sequence)
    return got


def test_requests_are_served_by_priority_then_arrival() -> None:
    scheduler = make(max_batch=1)
    for name, arrival_s, priority in (("late", 3.0, 0), ("early", 1.0, 0), ("urgent", 9.0, -1)):
        scheduler.add(request(name, arrival_s=arrival_s, priority=priority, max_tokens=1))
    assert [run_step(scheduler) for _ in range(3)] == [["urgent"], ["early"], ["late"]]


def test_a_long_prompt_is_prefilled_in_chunks_beside_decodes() -> None:
    scheduler = make()
    scheduler.add(request("short", prompt=4, max_tokens=8))
    assert run_step(scheduler) == ["short"]
    scheduler.add(request("long", prompt=30, max_tokens=2))
    steps = [run_step(scheduler) for _ in range(3)]
    assert steps == [["short"], ["short"], ["short", "long"]]


def test_a_step_never_exceeds_its_budget(rng: np.random.Generator) -> None:
    scheduler = make(num_pages=40)
    for index in range(30):
        scheduler.add(request(f"r{index}", prompt=int(rng.integers(1, 40)), max_tokens=int(rng.integers(1, 20))))
    while scheduler.waiting or scheduler.running:
        plan = scheduler.plan()
        assert plan, "work is left but nothing was planned"
        assert len(plan.decodes) + sum(count for _, count in plan.prefills) <= 12
        assert len(scheduler.running) <= 4
        for sequence, count in [(s, 1) for s in plan.decodes] + list(plan.prefills):
            last = sequence.pending == count
            scheduler.computed(sequence, count)
            if last:
                sequence.tokens.append(7)
                if sequence.generated == sequence.request.sampling.max_tokens:
                    scheduler.finish(sequence)


def test_the_last_in_order_is_preempted_and_finishes_later() -> None:
    scheduler = make(num_pages=6, prefix_cache=False)
    scheduler.add(request("first", prompt=8, max_tokens=12))
    scheduler.add(request("second", prompt=4, max_tokens=12, arrival_s=1.0))
    finished: list[str] = []
    for _ in range(60):
        for name in run_step(scheduler):
            if not any(s.request.id == name for s in scheduler.running):
                finished.append(name)
    assert scheduler.preemptions > 0
    assert finished == ["first", "second"]
    assert scheduler.allocator.available == 6


def test_equal_prefixes_share_pages_unless_the_salt_differs() -> None:
    scheduler = make()
    prompt = tuple(range(10))
    sampling = SamplingParams(max_tokens=3)
    scheduler.add(Request(id="a", prompt=prompt, sampling=sampling))
    run_step(scheduler)
    scheduler.add(Request(id="b", prompt=prompt, sampling=sampling))
    scheduler.add(Request(id="c", prompt=prompt, sampling=sampling, salt="tenant"))
    run_step(scheduler)
    hits = {s.request.id: s.cached_tokens for s in scheduler.running}
    assert hits == {"a": 0, "b": 8, "c": 0}
    a, b, _ = scheduler.running
    assert a.page_table.pages[:2] == b.page_table.pages[:2]
    assert scheduler.prefix_hit_tokens == 8


def test_keys_of_a_request_are_used_and_its_output_continues_them() -> None:
    hashed, given = make(), make()
    prompt = tuple(range(10))
    keys = tuple(page_keys(prompt, 4, given.namespace.root("tenant")))
    sampling = SamplingParams(max_tokens=5)
    hashed.add(Request(id="a", prompt=prompt, sampling=sampling, salt="tenant"))
    given.add(Request(id="a", prompt=prompt, sampling=sampling, salt="tenant", keys=keys))
    for scheduler in (hashed, given):
        (sequence,) = scheduler.waiting
        while scheduler.running or scheduler.waiting:
            run_step(scheduler)
        # 14 of 15 tokens have KV: three pages, the last of which the output filled.
        assert scheduler.allocator.cached == 3
        assert tuple(sequence.keys()[:2]) == keys
        assert sequence.keys() == page_keys(sequence.tokens, 4, scheduler.namespace.root("tenant"))


def test_keys_that_are_not_of_the_prompts_pages_are_refused() -> None:
    scheduler = make()
    for keys, entries in (((b"one",), "1 entries, 1 of them bytes"), ((7, 8), "2 entries, 0 of them bytes")):
        with pytest.raises(RequestRefusedError, match=f"`keys` has {entries}; send the keys of all 2 full pages of 4"):
            scheduler.add(Request(id="a", prompt=tuple(range(10)), keys=keys))
    assert not scheduler.waiting


def test_the_namespace_has_the_layout_and_dtype_of_the_pool() -> None:
    layout = KVLayout(num_layers=1, num_pages=16, page_size=4, num_kv_heads=1, head_dim=4, dtype="bfloat16")
    named = Namespace(model="m", revision="r")
    scheduler = Scheduler(EngineConfig(page_size=4), layout, max_model_len=64, namespace=named)
    assert scheduler.namespace == dataclasses.replace(named, layout=layout.fingerprint, dtype="bfloat16")


def test_a_finished_request_leaves_its_output_for_the_next_turn() -> None:
    scheduler = make()
    scheduler.add(request("turn1", prompt=6, max_tokens=7))
    sequence = scheduler.waiting[0]
    while scheduler.running or scheduler.waiting:
        run_step(scheduler)
    scheduler.add(Request(id="turn2", prompt=(*sequence.tokens, 5, 5), sampling=SamplingParams(max_tokens=1)))
    run_step(scheduler)
    # 13 tokens known, the last one was never fed back: 12 tokens = 3 pages hold KV.
    assert scheduler.prefix_hit_tokens == 12


def test_requests_that_can_never_fit_are_refused_with_the_numbers() -> None:
    scheduler = make(num_pages=4, max_model_len=32)
    with pytest.raises(RequestRefusedError, match=r"30 prompt tokens \+ max_tokens 4 = 34 exceed the model length 32"):
        scheduler.add(request("long", prompt=30))
    with pytest.raises(RequestRefusedError, match="need 5 pages of 4 tokens, the pool has 4"):
        scheduler.add(request("big", prompt=14))
    with pytest.raises(RequestRefusedError, match="no tokens"):
        scheduler.add(request("empty", prompt=0))
    scheduler.add(request("fits", prompt=13))
    with pytest.raises(RequestRefusedError, match="'fits' is already"):
        scheduler.add(request("fits"))
    assert len(scheduler.waiting) == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_nothing_leaks_over_random_adds_steps_and_aborts(rng: np.random.Generator, deterministic: bool) -> None:
    scheduler = make(num_pages=24, deterministic=deterministic)
    alive: set[str] = set()
    for index in range(3000):
        action = rng.integers(4)
        if action == 0:
            name = f"r{index}"
            prompt = int(rng.integers(1, 30))
            shared = tuple(range(int(rng.integers(3)), prompt + 3))[:prompt]
            sampling = SamplingParams(max_tokens=int(rng.integers(1, 20)))
            scheduler.add(
                Request(
                    id=name, prompt=shared, sampling=sampling, arrival_s=float(index), priority=int(rng.integers(2))
                )
            )
            alive.add(name)
        elif action == 1 and alive:
            name = sorted(alive)[rng.integers(len(alive))]
            scheduler.abort(name)
            assert not scheduler.abort(name)
            alive.discard(name)
        else:
            run_step(scheduler)
            alive = {s.request.id for s in (*scheduler.running, *scheduler.waiting)}
        held = {page for s in scheduler.running for page in s.page_table.pages}
        assert scheduler.allocator.referenced == len(held)
    for name in alive:
        scheduler.abort(name)
    assert scheduler.allocator.available == 24


def test_a_budget_that_starves_prefill_is_refused() -> None:
    with pytest.raises(EngineError, match="leaves nothing for prefill"):
        EngineConfig(max_batch=8, token_budget=8)
    with pytest.raises(EngineError, match="`page_size` is 0"):
        EngineConfig(page_size=0)


def test_a_deterministic_engine_takes_turns_and_ends_chunks_at_multiples_of_the_budget() -> None:
    scheduler = make(num_pages=64, deterministic=True)
    for name, prompt in (("a", 30), ("b", 5), ("c", 14), ("d", 12)):
        scheduler.add(request(name, prompt=prompt, max_tokens=6))
    kinds, chunks = [], []
    while scheduler.waiting or scheduler.running:
        plan = scheduler.plan()
        assert plan, "work is left but nothing was planned"
        assert not (plan.decodes and plan.prefills)
        kinds.append("decode" if plan.decodes else "prefill")
        chunks += [(sequence.request.id, sequence.computed, count) for sequence, count in plan.prefills]
        finish_step(scheduler, plan)
    assert sorted(chunks) == [
        ("a", 0, 12),
        ("a", 12, 12),
        ("a", 24, 6),
        ("b", 0, 5),
        ("c", 0, 12),
        ("c", 12, 2),
        ("d", 0, 12),
    ]
    first_decode = kinds.index("decode")
    assert "prefill prefill" not in " ".join(kinds[first_decode:])


def test_a_deterministic_engine_computes_emitted_tokens_by_decode_steps() -> None:
    scheduler = make(num_pages=64, deterministic=True)
    scheduler.add(request("a", prompt=14, max_tokens=6), emitted=(7, 8, 9))
    steps = []
    while scheduler.waiting or scheduler.running:
        plan = scheduler.plan()
        steps.append(
            [("decode", s.computed) for s in plan.decodes] + [("prefill", count) for _, count in plan.prefills]
        )
        finish_step(scheduler, plan)
    assert steps == [[("prefill", 12)], [("prefill", 2)], *[[("decode", 14 + index)] for index in range(5)]]


def test_what_decode_steps_computed_is_not_reused_in_a_deterministic_engine() -> None:
    scheduler = make(num_pages=64, deterministic=True)
    scheduler.add(request("turn1", prompt=18, max_tokens=12))
    tokens = scheduler.waiting[0].tokens
    while scheduler.waiting or scheduler.running:
        finish_step(scheduler, scheduler.plan())
    scheduler.add(Request(id="turn2", prompt=(*tokens, 5, 5), sampling=SamplingParams(max_tokens=1)))
    finish_step(scheduler, scheduler.plan())
    assert scheduler.prefix_hit_tokens == 12
