"""The handlers over any backend: what they answer does not depend on who generates, and a rejection reaches HTTP."""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from model.tokenizer import Tokenizer
from serving.api.backend import Backend
from serving.api.streams import Submission
from serving.api.worker import EngineWorker
from serving.conductor.types import Rejection
from serving.request import Request
from tests.serving.api.clients import client_of, completion, events
from tests.serving.api.fakes import FakeBackend, ScriptedEngine

REJECTION = Rejection(reason="ttft", predicted_ttft_s=41.5, predicted_tbt_s=0.08, retry_after_s=11.2)


async def asked(backend: Backend, tokenizer: Tokenizer, **fields: object) -> httpx.Response:
    async with client_of(backend, tokenizer) as client:
        return await completion(client, **fields)


def without_identity(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"prompt": ["abc", "xy"]}, {"stop": "ca", "max_tokens": 90}])
def test_answers_are_the_same_whoever_generates(tokenizer: Tokenizer, fields: dict[str, object]) -> None:
    one = asyncio.run(asked(FakeBackend(), tokenizer, **fields))
    other = asyncio.run(asked(EngineWorker(ScriptedEngine(), max_open_requests=8), tokenizer, **fields))
    assert one.status_code == other.status_code == 200
    assert without_identity(one.json())["choices"] == without_identity(other.json())["choices"]


def test_a_stream_of_a_backend(tokenizer: Tokenizer) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = events(asyncio.run(asked(FakeBackend(), tokenizer, **options)))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcab"
    assert last["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize(
    ("fields", "prompt_tokens", "completion_tokens"),
    [
        ({"prompt": "abc", "n": 3}, 3, 15),
        ({"prompt": ["ab", "ab", "ab"]}, 6, 15),
        ({"prompt": ["ab", "ab", "abc"], "n": 2}, 7, 30),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_every_prompt_is_counted_once(
    tokenizer: Tokenizer, fields: dict[str, object], prompt_tokens: int, completion_tokens: int, stream: bool
) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    answer = asyncio.run(asked(FakeBackend(), tokenizer, **fields, **options))
    usage = events(answer)[-1]["usage"] if stream else answer.json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt_tokens, completion_tokens)


def test_log_probabilities_of_parts_of_characters(tokenizer: Tokenizer) -> None:
    prompt = "a你b"
    engine = EngineWorker(ScriptedEngine(), max_open_requests=8)
    choice = asyncio.run(asked(engine, tokenizer, prompt=prompt, logprobs=2, echo=False)).json()["choices"][0]
    assert choice["text"] == prompt
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["a", r"bytes:\xe4", r"bytes:\xbd", r"bytes:\xa0", "b"]
    assert logprobs["text_offset"] == [0, 1, 1, 1, 2]
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])

    async def chat() -> httpx.Response:
        worker = EngineWorker(ScriptedEngine(), max_open_requests=8)
        async with client_of(worker, tokenizer) as client:
            body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 13, "logprobs": True}
            return await client.post("/v1/chat/completions", json=body)

    content = asyncio.run(chat()).json()["choices"][0]["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in content).startswith(b"<|user|>" + prompt.encode() + b"<|end|>")


async def with_metrics(
    backend: Backend, tokenizer: Tokenizer, **fields: object
) -> tuple[dict[str, Any], dict[str, float]]:
    async with client_of(backend, tokenizer) as client:
        answer = (await completion(client, **fields)).json()
        text = (await client.get("/metrics")).text
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    metrics = {sample.name: sample.value for sample in samples if not sample.name.endswith("_bucket")}
    ends = [sample for sample in samples if sample.name == "halfmoon:request_success_total"]
    reasons = {f"ended_{sample.labels['finished_reason']}": sample.value for sample in ends}
    return answer, metrics | reasons


@pytest.mark.parametrize("max_tokens", [5, 6, 90])
def test_tokens_after_a_stop_string_are_nobodys(tokenizer: Tokenizer, max_tokens: int) -> None:
    """The backend runs ahead of whoever looks for the stop string, which may even be complete in the last token."""

    class AheadBackend(FakeBackend):
        async def submit(self, requests: Sequence[Request]) -> Submission:
            submission = await super().submit(requests)
            while self.open_requests:
                await asyncio.sleep(0)
            return submission

    answer, metrics = asyncio.run(
        with_metrics(AheadBackend(), tokenizer, stop="ab", max_tokens=max_tokens, prompt="xyzab")
    )
    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("xyz", "stop")
    assert answer["usage"]["completion_tokens"] == 5
    assert (metrics["ended_stop"], metrics.get("ended_length")) == (1, None)
    assert metrics["halfmoon:request_generation_tokens_sum"] == 5


def test_a_complete_stop_string_aborts_at_the_backend(tokenizer: Tokenizer) -> None:
    backend = FakeBackend()
    answer = asyncio.run(asked(backend, tokenizer, stop="ca", max_tokens=90))
    assert answer.json()["choices"][0]["text"] == "ab"
    assert [reason for _, reason in backend.ended] == ["stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_rejection_is_answered_with_its_prediction(tokenizer: Tokenizer, stream: bool) -> None:
    answer = asyncio.run(asked(FakeBackend(rejection=REJECTION), tokenizer, stream=stream))
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "12"
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["reason"]) == ("rate_limit_error", "rejected", "ttft")
    assert (error["predicted_ttft_s"], error["predicted_tbt_s"]) == (41.5, 0.08)
    assert error["message"] == (
        "The request was rejected (ttft): its TTFT would be 41.5 s and its TBT 0.08 s. Retry after 11.2 s."
    )


def test_a_rejection_after_prefill_is_a_429_or_the_end_of_a_stream(tokenizer: Tokenizer) -> None:
    answer = asyncio.run(asked(FakeBackend(rejection=REJECTION, rejects_after=2), tokenizer))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "12")
    streamed = asyncio.run(asked(FakeBackend(rejection=REJECTION, rejects_after=2), tokenizer, stream=True))
    assert streamed.status_code == 200
    *chunks, last = events(streamed)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) in ("", "a", "ab")
    assert (last["error"]["type"], last["error"]["predicted_ttft_s"]) == ("rate_limit_error", 41.5)
