"""The library call, and what the engine logs about requests."""

import dataclasses
import logging

import pytest
from flax import nnx

from model.sampling import SamplingParams
from model.transformer import Transformer
from serving.engine import EngineError, RequestRefusedError
from serving.engine.build import build_engine
from serving.engine.engine import Engine
from serving.request import Request
from tests.serving.engine.tiny import CONFIG, SIZES, prompts

GREEDY = SamplingParams(temperature=0.0, max_tokens=5)


@pytest.fixture
def engine() -> Engine:
    return build_engine(Transformer(CONFIG, nnx.Rngs(0)), SIZES)


def test_generate_returns_what_the_steps_yield(engine: Engine) -> None:
    asked = prompts(5)
    together = engine.generate(asked, GREEDY)
    for prompt, generation in zip(asked, together, strict=True):
        engine.add(Request(id="alone", prompt=prompt, sampling=GREEDY))
        tokens = []
        while engine.has_work:
            tokens += [event.token for event in engine.step()]
        assert generation.tokens == tuple(tokens)
        assert generation.finish_reason == "length"
        assert generation.logprobs == generation.top_logprobs == ()


def test_each_prompt_may_have_its_own_sampling(engine: Engine) -> None:
    short = SamplingParams(temperature=0.0, max_tokens=2, logprobs=1)
    first, second = engine.generate(prompts(2), [short, GREEDY])
    assert (len(first.tokens), len(second.tokens)) == (2, 5)
    assert [(token, logprob) for ((token, logprob),) in first.top_logprobs] == [
        *zip(first.tokens, first.logprobs, strict=True)
    ]
    stop = SamplingParams(temperature=0.0, max_tokens=9, stop_token_ids=(first.tokens[0],))
    (stopped,) = engine.generate(prompts(1), stop)
    assert (stopped.tokens, stopped.finish_reason) == (first.tokens[:1], "stop")
    assert stopped.cached_tokens == len(prompts(1)[0]) // 8 * 8


def test_generate_serves_all_prompts_or_none(engine: Engine) -> None:
    assert engine.generate([], GREEDY) == []
    with pytest.raises(RequestRefusedError, match=r"prompts\[1\]: prompt token 97 is outside the vocabulary"):
        engine.generate([(1, 2), (97,)], GREEDY)
    outside = SamplingParams(stop_token_ids=(97,))
    with pytest.raises(RequestRefusedError, match=r"prompts\[1\]: `stop_token_ids` is 97"):
        engine.generate(prompts(2), [GREEDY, outside])
    with pytest.raises(RequestRefusedError, match=r"prompts\[0\]: the prompt has no tokens"):
        engine.generate([()], GREEDY)
    assert not engine.has_work
    with pytest.raises(EngineError, match="2 prompts and 1 `sampling`s"):
        engine.generate(prompts(2), [GREEDY])
    engine.add(Request(id="open", prompt=(1, 2), sampling=GREEDY))
    with pytest.raises(EngineError, match="without open requests"):
        engine.generate(prompts(2), GREEDY)


def test_the_life_of_every_request_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine = build_engine(Transformer(CONFIG, nnx.Rngs(0)), dataclasses.replace(SIZES, num_pages=8))
    caplog.set_level(logging.DEBUG, logger="serving.engine")
    for name in ("first", "second"):
        engine.add(Request(id=name, prompt=prompts(1)[0][:17], sampling=SamplingParams(temperature=0.0, max_tokens=20)))
    engine.add(Request(id="third", prompt=(1, 2, 3), sampling=GREEDY))
    engine.abort("third")
    while engine.has_work:
        engine.step()
    with pytest.raises(RequestRefusedError):
        engine.add(Request(id="empty", prompt=(), sampling=GREEDY))
    said = [(record.levelname, record.getMessage()) for record in caplog.records]
    for level, message in (
        ("DEBUG", "request first admitted: 0 of 17 tokens cached"),
        ("DEBUG", "request first finished: length after 20 tokens"),
        ("DEBUG", "request second finished: length after 20 tokens"),
        ("DEBUG", "request third aborted"),
        ("WARNING", "request empty refused: the prompt has no tokens; send at least one."),
    ):
        assert said.count((level, message)) == 1, said
    assert any(message.startswith("request second preempted after") for _, message in said)


def test_warm_up_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="serving.engine")
    engine = build_engine(Transformer(CONFIG, nnx.Rngs(0)), SIZES)
    engine.warm_up()
    assert any(record.getMessage().startswith("warm-up: ") for record in caplog.records)
