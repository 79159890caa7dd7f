"""What clients see when the engine breaks, is full or refuses: on a scripted engine, in this process."""

import asyncio
import contextlib
from collections.abc import Sequence

import httpx
import pytest

from model.sampling_params import SamplingParamsError
from model.tokenizer import Tokenizer
from serving.api.worker import EngineWorker
from tests.serving.api.clients import client_of, completion, events
from tests.serving.api.fakes import ScriptedEngine


def served(
    engine: ScriptedEngine, tokenizer: Tokenizer, *, max_open_requests: int = 8
) -> contextlib.AbstractAsyncContextManager[httpx.AsyncClient]:
    return client_of(EngineWorker(engine, max_open_requests=max_open_requests), tokenizer)


async def until_open(client: httpx.AsyncClient, count: int) -> None:
    while (await client.get("/health")).json()["open_requests"] != count:
        await asyncio.sleep(0.01)


def test_a_failed_engine_is_told_to_every_open_request_and_to_health(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(step_s=0.005)
        async with served(engine, tokenizer) as client:
            whole, stream = completion(client, max_tokens=1000), completion(client, stream=True, max_tokens=1000)
            await until_open(client, 2)
            steps = engine.steps
            while engine.steps < steps + 3:
                await asyncio.sleep(0.01)
            engine.breaks_at = engine.steps
            answer = await whole
            assert answer.status_code == 503
            assert "RuntimeError: the device is gone" in answer.json()["error"]["message"]
            first, *_, last = events(await stream)
            # On a busy machine one event may carry several tokens.
            assert first["choices"][0]["text"].startswith("a")
            assert last["error"]["type"] == "server_error"
            assert "RuntimeError: the device is gone" in caplog.text  # with its traceback

            health = await client.get("/health")
            assert health.status_code == 503
            assert "the device is gone" in health.json()["error"]["message"]
            later = await completion(client)
            assert later.status_code == 503

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (
            SamplingParamsError("stop_token_ids", 999, "the vocabulary ends at token id 259"),
            400,
            "`stop_token_ids` is 999",
        ),
        (OverflowError("int too large"), 500, "The server failed on this request: OverflowError: int too large"),
    ],
)
def test_what_a_request_does_to_the_engine_when_it_is_added_costs_no_other(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, error: Exception, status: int, message: str
) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(step_s=0.005)
        async with served(engine, tokenizer) as client:
            running = completion(client, max_tokens=50)
            while not engine.steps:
                await asyncio.sleep(0.01)
            engine.add_error = error
            answer = await completion(client)
            assert answer.status_code == status
            assert message in answer.json()["error"]["message"]
            engine.add_error = None
            assert (await running).json()["usage"]["completion_tokens"] == 50
            assert (await completion(client)).status_code == 200
            assert ("OverflowError" in caplog.text) == (status == 500)

    asyncio.run(scenario())


def test_a_fault_in_a_streams_text_ends_it_with_an_error_event(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raise KeyError("no such token")

    monkeypatch.setattr(tokenizer, "decode", broken)

    async def scenario() -> None:
        engine = ScriptedEngine()
        async with served(engine, tokenizer) as client:
            last = events(await completion(client, stream=True, max_tokens=1000))[-1]
            assert last["error"]["message"] == "The server failed on this request: KeyError: 'no such token'"
            await until_open(client, 0)
            assert "A stream failed." in caplog.text

    asyncio.run(scenario())


def test_a_full_server_answers_429_and_says_when_to_come_back(tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with served(ScriptedEngine(step_s=0.01), tokenizer, max_open_requests=2) as client:
            running = completion(client, n=2, max_tokens=30)
            await until_open(client, 2)
            answer = await completion(client)
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            error = answer.json()["error"]
            assert error["type"] == "rate_limit_error"
            assert "1 more would join 2 open requests, and it lets in 2" in error["message"]
            assert (await running).status_code == 200
            assert (await completion(client)).status_code == 200

    asyncio.run(scenario())


def test_more_choices_than_ever_fit_are_refused_for_good(tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        async with served(ScriptedEngine(), tokenizer, max_open_requests=2) as client:
            answer = await completion(client, n=3)
            assert answer.status_code == 400
            assert "3 choices were asked for at once" in answer.json()["error"]["message"]

    asyncio.run(scenario())


def test_one_refused_prompt_aborts_those_sent_with_it(tokenizer: Tokenizer) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(step_s=0.01, max_model_len=10)
        async with served(engine, tokenizer) as client:
            answer = await completion(client, prompt=["abc", "a" * 11])
            assert answer.status_code == 400
            assert answer.json()["error"]["message"] == "11 tokens never fit."
            await until_open(client, 0)
            while engine.has_work:
                await asyncio.sleep(0.01)
            assert len(engine.aborted) == 1

    asyncio.run(scenario())


def test_stopping_the_server_aborts_what_is_open(tokenizer: Tokenizer) -> None:
    async def scenario() -> ScriptedEngine:
        engine = ScriptedEngine(step_s=0.01)
        async with served(engine, tokenizer) as client:
            running = completion(client, max_tokens=1000)
            await until_open(client, 1)
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
        return engine

    engine = asyncio.run(scenario())
    assert len(engine.aborted) == 1
    assert not engine.has_work


@pytest.mark.parametrize(
    ("fields", "text", "stop_reason"),
    [
        ({"stop": ["c a", "zz"]}, "ab ", "c a"),
        ({"stop": "c a", "include_stop_str_in_output": True}, "ab c a", "c a"),
        ({"stop": "b", "min_tokens": 4}, "ab c aa", "b"),
    ],
)
def test_stop_strings(tokenizer: Tokenizer, fields: dict[str, object], text: str, stop_reason: str) -> None:
    async def scenario() -> None:
        engine = ScriptedEngine(step_s=0.005)
        async with served(engine, tokenizer) as client:
            answer = await completion(client, prompt="ab c a", max_tokens=500, **fields)
            choice = answer.json()["choices"][0]
            assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (text, "stop", stop_reason)
            while engine.has_work:
                await asyncio.sleep(0.01)
            assert len(engine.aborted) == 1

    asyncio.run(scenario())
