"""Answering one HTTP request: submit its choices, send the text as it comes or at the end, stop when nobody listens."""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from model.tokenizer import Tokenizer
from serving.api.detokenize import TextDelta, joined, text_deltas
from serving.api.errors import ApiError, invalid
from serving.api.metrics import ServerMetrics
from serving.api.responses import Renderer, usage
from serving.api.schemas import GenerationBody
from serving.api.streams import Submission
from serving.api.worker import EngineFailedError, EngineWorker, QueueFullError
from serving.engine.errors import RequestRefusedError
from serving.engine.types import Request

# nginx and others would otherwise collect a stream before they pass it on.
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclasses.dataclass(frozen=True)
class Services:
    """What every route needs."""

    worker: EngineWorker
    tokenizer: Tokenizer
    metrics: ServerMetrics
    model_name: str
    max_model_len: int
    vocab_size: int


async def answer(
    services: Services, http: HttpRequest, body: GenerationBody, requests: Sequence[Request], renderer: Renderer
) -> Response:
    """Generates `requests`, one choice each, and answers as `body` asks. Raises ApiError."""
    submission = await _submit(services, requests)
    deltas = text_deltas(submission, services.worker, services.tokenizer, include_stop=body.include_stop_str_in_output)
    if body.stream:
        return _EventStream(_events(submission, deltas, body, renderer), services.worker, submission)
    try:
        return await _unless_disconnected(http, _whole(submission, deltas, renderer))
    finally:
        services.worker.close(submission)


async def _submit(services: Services, requests: Sequence[Request]) -> Submission:
    try:
        return await services.worker.submit(requests)
    except QueueFullError as error:
        raise ApiError(429, str(error), retry_after_s=services.metrics.seconds_until_a_place()) from error
    except RequestRefusedError as error:
        raise invalid(str(error)) from error
    except EngineFailedError as error:
        raise ApiError(503, str(error)) from error


async def _whole(submission: Submission, deltas: AsyncIterator[TextDelta], renderer: Renderer) -> Response:
    parts: list[list[TextDelta]] = [[] for _ in submission.streams]
    try:
        async for delta in deltas:
            parts[delta.choice].append(delta)
    except EngineFailedError as error:
        raise ApiError(503, str(error)) from error
    content = renderer.whole([joined(choice) for choice in parts])
    return JSONResponse(content | {"usage": _usage(submission)})


async def _unless_disconnected(http: HttpRequest, work: Any) -> Response:
    """The result of `work`, which is cancelled if the client goes away first."""
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        # Nobody reads this answer; 499 is what access logs call it.
        return working.result() if working.done() else Response(status_code=499)
    finally:
        working.cancel()
        listening.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    submission: Submission, deltas: AsyncIterator[TextDelta], body: GenerationBody, renderer: Renderer
) -> AsyncIterator[bytes]:
    """The server-sent events of a stream: chunks, the usage if asked for, `[DONE]`; an error midway is one too."""
    options = body.stream_options
    with_usage = options is not None and options.include_usage
    running = with_usage and options is not None and options.continuous_usage_stats

    def sent(chunk: dict[str, Any]) -> bytes:
        if with_usage:
            chunk["usage"] = _usage(submission) if running else None
        return _event(chunk)

    try:
        for choice in range(len(submission.streams)):
            if (chunk := renderer.opening(choice)) is not None:
                yield sent(chunk)
        async for delta in deltas:
            yield sent(renderer.chunk(delta))
    except EngineFailedError as error:
        yield _event(ApiError(503, str(error)).body)
    else:
        if with_usage:
            yield _event(renderer.chunk_of([]) | {"usage": _usage(submission)})
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _usage(submission: Submission) -> dict[str, Any]:
    """Tokens so far. Choices of one prompt compute it once each; as with OpenAI it counts once per prompt."""
    streams = submission.streams
    prompts = {stream.request.prompt: stream.cached_tokens for stream in reversed(streams)}
    return usage(
        sum(len(prompt) for prompt in prompts),
        sum(stream.tokens for stream in streams),
        sum(prompts.values()),
    )


class _EventStream(StreamingResponse):
    """A stream of server-sent events that aborts its requests when it ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], worker: EngineWorker, submission: Submission) -> None:
        super().__init__(events, headers=_STREAM_HEADERS)
        self._worker = worker
        self._submission = submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._worker.close(self._submission)
