"""A deterministic engine: a request's tokens and log-probabilities have the same bits whatever happens around it."""

import dataclasses

import numpy as np
import pytest
from flax import nnx

from model.sampling import SamplingParams
from model.transformer import Transformer
from serving.engine import EngineConfig, EngineError, RequestRefusedError, TokenEvent
from serving.engine.build import build_engine
from serving.engine.engine import Engine
from serving.request import Request
from tests.serving.engine.tiny import CONFIG

SIZES = EngineConfig(
    page_size=16, num_pages=64, max_batch=4, token_budget=32, max_prefill_rows=3, max_model_len=112, deterministic=True
)
TOKENS = 30
GREEDY = SamplingParams(temperature=0.0, max_tokens=TOKENS, logprobs=2)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, seed=7, max_tokens=TOKENS, logprobs=2)
Bits = tuple[int, float | None, tuple[tuple[int, float], ...]]


def requests() -> list[Request]:
    """Greedy and sampled requests whose prompts take one to three chunks; some share one or two whole chunks."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 97, 90).tolist()
    prompts = [
        shared[:70],
        shared[:64],
        [*shared[:40], 5],
        rng.integers(0, 97, 33).tolist(),
        rng.integers(0, 97, 32).tolist(),
        [3],
        shared[:80],
        rng.integers(0, 97, 17).tolist(),
    ]
    samplings = [GREEDY, SAMPLED, dataclasses.replace(SAMPLED, seed=8, presence_penalty=0.3)]
    return [
        Request(id=f"r{index}", prompt=tuple(prompt), sampling=samplings[index % 3])
        for index, prompt in enumerate(prompts)
    ]


def run(engine: Engine) -> dict[str, list[Bits]]:
    """Tokens and log-probabilities of everything that the engine holds, to the end."""
    bits: dict[str, list[Bits]] = {}
    while engine.has_work:
        for event in engine.step():
            bits.setdefault(event.request_id, []).append((event.token, event.logprob, event.top_logprobs))
    return bits


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return Transformer(dataclasses.replace(CONFIG, head_dim=16), nnx.Rngs(0), request.param)


@pytest.fixture(scope="module")
def alone(model: Transformer) -> dict[str, list[Bits]]:
    """What each request generates in an engine of its own."""
    bits: dict[str, list[Bits]] = {}
    for request in requests():
        engine = build_engine(model, SIZES)
        engine.add(request)
        bits |= run(engine)
    return bits


@pytest.mark.parametrize("backwards", [False, True])
def test_bits_are_the_same_under_load(model: Transformer, alone: dict[str, list[Bits]], backwards: bool) -> None:
    engine = build_engine(model, SIZES)
    coming = requests()[::-1] if backwards else requests()
    bits: dict[str, list[Bits]] = {}
    for request in coming:
        engine.add(request)
        for event in engine.step():
            bits.setdefault(event.request_id, []).append((event.token, event.logprob, event.top_logprobs))
    for request_id, rest in run(engine).items():
        bits.setdefault(request_id, []).extend(rest)
    assert bits == alone
    assert engine.stats().prefix_hit_tokens >= 64


def test_bits_are_the_same_after_preemption(model: Transformer, alone: dict[str, list[Bits]]) -> None:
    engine = build_engine(model, dataclasses.replace(SIZES, num_pages=11))
    for request in requests():
        engine.add(request)
    assert run(engine) == alone
    assert engine.stats().preemptions > 0
    assert engine.stats().pages_used == 0


def test_bits_are_the_same_on_a_second_visit(model: Transformer, alone: dict[str, list[Bits]]) -> None:
    """Whole chunks of earlier prompts are reused, and nothing that decode steps or shorter chunks left behind."""
    engine = build_engine(model, SIZES)
    for _ in range(2):
        hits = engine.stats().prefix_hit_tokens
        for request in requests():
            engine.add(request)
        assert run(engine) == alone
    # Of prompts of 70, 64, 41, 33, 32, 1, 80 and 17 tokens; a chunk with a prompt's last token is computed.
    assert engine.stats().prefix_hit_tokens - hits == 64 + 32 + 32 + 32 + 0 + 0 + 64 + 0
    first, *_ = requests()
    prompt = (*first.prompt, *(token for token, *_ in alone["r0"]), 1, 2)
    turn = dataclasses.replace(first, id="turn", prompt=prompt, sampling=dataclasses.replace(SAMPLED, max_tokens=8))
    engine.add(turn)
    again = run(engine)
    fresh = build_engine(model, SIZES)
    fresh.add(turn)
    assert again == run(fresh)


@pytest.mark.parametrize("emitted", [1, 11, TOKENS - 1])
def test_bits_are_the_same_after_a_resume(model: Transformer, alone: dict[str, list[Bits]], emitted: int) -> None:
    engine = build_engine(model, SIZES)
    for request in requests():
        engine.add(request, [token for token, *_ in alone[request.id][:emitted]])
    assert run(engine) == {request_id: bits[emitted:] for request_id, bits in alone.items()}
    assert engine.stats().generated_tokens == len(alone) * (TOKENS - emitted)


def test_a_resume_may_be_preempted(model: Transformer, alone: dict[str, list[Bits]]) -> None:
    engine = build_engine(model, dataclasses.replace(SIZES, num_pages=11))
    for request in requests():
        engine.add(request, [token for token, *_ in alone[request.id][:11]])
    assert run(engine) == {request_id: bits[11:] for request_id, bits in alone.items()}
    assert engine.stats().preemptions > 0


def test_two_step_shapes_are_all_that_warm_up_compiles(model: Transformer) -> None:
    engine = build_engine(model, SIZES)
    done: list[tuple[int, int]] = []
    engine.warm_up(lambda *progress: done.append(progress))
    assert done == [(1, 2), (2, 2)]
    for request in requests():
        engine.add(request)
    run(engine)
    assert engine.stats().compiles_after_warm_up == 0


def test_a_request_without_a_seed_gets_the_same_one_in_any_order(model: Transformer) -> None:
    free = [
        dataclasses.replace(request, sampling=dataclasses.replace(SAMPLED, seed=None)) for request in requests()[3:6]
    ]
    forth, back = (build_engine(model, SIZES) for _ in range(2))
    for request in free:
        forth.add(request)
    for request in reversed(free):
        back.add(request)
    assert run(forth) == run(back)


def test_a_request_also_resumes_in_the_default_mode(model: Transformer) -> None:
    """With the tokens that are likely to come; bits are not promised there."""
    sizes = dataclasses.replace(SIZES, deterministic=False)
    request = dataclasses.replace(requests()[4], sampling=dataclasses.replace(GREEDY, max_tokens=3))
    engine = build_engine(model, sizes)
    engine.add(request)
    tokens = [token for token, *_ in run(engine)[request.id]]
    engine = build_engine(model, sizes)
    engine.add(request, tokens[:2])
    events: list[TokenEvent] = []
    while engine.has_work:
        events += engine.step()
    (event,) = events
    assert event.finish_reason == "length"
    assert 0 <= event.token < 97


def test_what_cannot_be_resumed_is_refused(model: Transformer) -> None:
    engine = build_engine(model, SIZES)
    request = requests()[0]
    with pytest.raises(RequestRefusedError, match="30 tokens were emitted of `max_tokens` 30"):
        engine.add(request, [1] * TOKENS)
    with pytest.raises(RequestRefusedError, match="token 97 is outside the vocabulary"):
        engine.add(request, [97])
    unseeded = dataclasses.replace(request, sampling=dataclasses.replace(SAMPLED, seed=None))
    with pytest.raises(RequestRefusedError, match="only with the seed that it had"):
        engine.add(unseeded, [1])
    assert not engine.has_work


def test_a_chunk_must_be_whole_pages() -> None:
    with pytest.raises(EngineError, match=r"`token_budget` 40 tokens; make it a multiple of `page_size` 16"):
        dataclasses.replace(SIZES, token_budget=40)
