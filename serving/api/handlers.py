"""Handles one HTTP request: submits its choices, streams their text or sends it whole, aborts when the client goes."""

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from model.tokenizer import Tokenizer
from serving.api.backend import Backend, BackendError, QueueFullError, RejectedError, RequestFailedError
from serving.api.detokenize import TextDelta, joined, text_deltas
from serving.api.errors import ApiError, invalid, rejected
from serving.api.metrics import ServerMetrics
from serving.api.responses import Renderer, usage
from serving.api.schemas import GenerationBody
from serving.api.streams import Submission
from serving.engine.errors import RequestRefusedError
from serving.request import Request

_logger = logging.getLogger(__name__)

# nginx and others would otherwise collect a stream before they pass it on.
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Services:
    """What every route needs.

    Attributes:
        backend: generates.
        tokenizer: the model's.
        metrics: observes `backend`.
        model_name: what clients call the model.
        max_model_len: most tokens of one request, prompt and output.
        vocab_size: token ids are below it.
    """

    backend: Backend
    tokenizer: Tokenizer
    metrics: ServerMetrics
    model_name: str
    max_model_len: int
    vocab_size: int


async def answer(
    services: Services, http: HttpRequest, body: GenerationBody, requests: Sequence[Request], renderer: Renderer
) -> Response:
    """Generates `requests`, one choice each, and answers as `body` asks. Raises ApiError."""
    backend = services.backend
    try:
        submission = await backend.submit(requests)
    except BackendError as error:
        raise _api_error(error, services) from error
    except RequestRefusedError as error:
        raise invalid(str(error)) from error
    deltas = text_deltas(
        submission,
        backend,
        services.tokenizer,
        continues=body.continues_prompt,
        include_stop=body.include_stop_str_in_output,
    )
    if body.stream:
        return _EventStream(_events(submission, deltas, body, renderer, services), backend, submission)
    try:
        return await _unless_disconnected(http, _whole(submission, deltas, body, renderer))
    except BackendError as error:
        raise _api_error(error, services) from error
    finally:
        backend.close(submission)


def _api_error(error: BackendError, services: Services) -> ApiError:
    """The answer to a request that the backend does not serve."""
    if isinstance(error, RejectedError):
        return rejected(str(error), error.rejection)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), retry_after_s=services.metrics.seconds_until_a_place())
    return ApiError(500 if isinstance(error, RequestFailedError) else 503, str(error))


async def _whole(
    submission: Submission, deltas: AsyncIterator[TextDelta], body: GenerationBody, renderer: Renderer
) -> Response:
    parts: list[list[TextDelta]] = [[] for _ in submission.streams]
    async for delta in deltas:
        parts[delta.choice].append(delta)
    content = renderer.whole([joined(choice) for choice in parts])
    return JSONResponse(content | {"usage": _usage(submission, body.choices)})


async def _unless_disconnected(http: HttpRequest, work: Any) -> Response:
    """Returns what `work` returns; cancels it if the client disconnects first."""
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        # Nobody reads this answer; access logs call it 499.
        return working.result() if working.done() else Response(status_code=499)
    finally:
        working.cancel()
        listening.cancel()


async def _disconnected(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


async def _events(
    submission: Submission,
    deltas: AsyncIterator[TextDelta],
    body: GenerationBody,
    renderer: Renderer,
    services: Services,
) -> AsyncIterator[bytes]:
    """Yields server-sent events: chunks, the usage if `body` asks for it, an error that ends the stream, `[DONE]`."""
    options = body.stream_options
    with_usage = options is not None and options.include_usage
    running = with_usage and options is not None and options.continuous_usage_stats

    def sent(chunk: dict[str, Any]) -> bytes:
        if with_usage:
            chunk["usage"] = _usage(submission, body.choices) if running else None
        return _event(chunk)

    try:
        for choice in range(len(submission.streams)):
            if (chunk := renderer.opening(choice)) is not None:
                yield sent(chunk)
        async for delta in deltas:
            yield sent(renderer.chunk(delta))
    except BackendError as error:
        yield _event(_api_error(error, services).body)
    except Exception as error:
        # The status is sent: only an event can tell the client that the stream is cut short.
        _logger.exception("A stream failed.")
        yield _event(_api_error(RequestFailedError(error), services).body)
    else:
        if with_usage:
            yield _event(renderer.chunk_of([]) | {"usage": _usage(submission, body.choices)})
    yield b"data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


def _usage(submission: Submission, choices: int) -> dict[str, Any]:
    """Returns the tokens of the answer so far. As with OpenAI, the `choices` of one prompt count that prompt once."""
    prompts = submission.streams[::choices]
    return usage(
        sum(len(stream.request.prompt) for stream in prompts),
        sum(stream.answered_tokens for stream in submission.streams),
        sum(stream.times.cached_tokens for stream in prompts),
    )


class _EventStream(StreamingResponse):
    """A stream of server-sent events that aborts its requests when it ends, however it ends."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], backend: Backend, submission: Submission) -> None:
        super().__init__(events, headers=_STREAM_HEADERS)
        self._backend = backend
        self._submission = submission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._backend.close(self._submission)
