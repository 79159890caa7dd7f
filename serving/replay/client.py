"""One server over HTTP: its model, tokenizer, metrics, and streamed completions with the times of their tokens."""

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import httpx
from httpx_sse import SSEError, aconnect_sse

from serving.replay.errors import ReplayError
from serving.replay.scrape import ServerCounters
from serving.token_times import TokenTimes

_CONNECT_S = 10.0
_DONE = "[DONE]"


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """A model's name, and the most tokens of one request; `None` where the server does not report it."""

    name: str
    max_tokens: int | None


@dataclasses.dataclass(kw_only=True)
class Answer:
    """A server's answer to one request, so far.

    Attributes:
        status: of HTTP; 0 where no answer came.
        error: why the answer ended early; "" if it did not.
        times: arrival times of the tokens, in seconds on the event loop's clock.
        tokens: tokens generated, as the server counts them.
        cached_tokens: prompt tokens whose KV was reused; `None` where the server does not report them.
        pieces: events of the stream that carried tokens.
    """

    status: int = 0
    error: str = ""
    times: TokenTimes = dataclasses.field(default_factory=TokenTimes)
    tokens: int = 0
    cached_tokens: int | None = None
    pieces: int = 0

    def add(self, tokens: int, now_s: float) -> None:
        """Adds `tokens` tokens that came in one event; nothing for an event without tokens."""
        if tokens > 0:
            self.pieces += 1
            self.tokens += tokens
            self.times.record(now_s, tokens)


class ServerClient:
    """A client of one server; an async context manager.

    Args:
        url: of the server, with or without `/v1`.
        timeout_s: seconds without a byte after which an answer has failed.
    """

    def __init__(self, url: str, timeout_s: float = 600.0) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        # No proxy from the environment: only the server is to be measured.
        self._http = httpx.AsyncClient(
            base_url=self.url,
            timeout=httpx.Timeout(timeout_s, connect=_CONNECT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> "ServerClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def model(self) -> ServedModel:
        """Returns the first model that the server lists. Raises ReplayError."""
        response = await self._get("/v1/models")
        try:
            card = response.json()["data"][0]
            return ServedModel(card["id"], card.get("max_model_len"))
        except (ValueError, LookupError, TypeError) as error:
            raise ReplayError(
                f"{self.url}/v1/models answered {response.text[:200]!r}, which names no model: is this the address of "
                "an OpenAI-compatible server?"
            ) from error

    async def encode(self, model: str, text: str) -> list[int]:
        """Returns token ids of `text` without special tokens, from `/tokenize`; raises ReplayError without one."""
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        try:
            response = await self._http.post("/tokenize", json=body)
        except httpx.TransportError as error:
            raise self._silent(error) from error
        if response.status_code != 200:
            raise ReplayError(
                f"{self.url}/tokenize answered {response.status_code}, so prompts of exact lengths cannot be made by "
                "the server. Name the folder of the model's tokenizer: `--tokenizer=DIR`."
            )
        return response.json()["tokens"]

    async def counters(self) -> ServerCounters:
        """Returns the server's metrics; empty where it has none. Raises ReplayError if the server does not answer."""
        try:
            response = await self._http.get("/metrics")
            return ServerCounters.parse(response.text) if response.status_code == 200 else ServerCounters()
        except ValueError:
            return ServerCounters()
        except httpx.TransportError as error:
            raise self._silent(error) from error

    async def complete(self, body: bytes, on_first_token: Callable[[], None] = lambda: None) -> Answer:
        """Sends `body` of `completion_body` and reads the stream to its end; failures are reported in the answer."""
        answer, clock = Answer(), asyncio.get_running_loop().time
        headers = {"Content-Type": "application/json"}
        try:
            async with aconnect_sse(self._http, "POST", "/v1/completions", content=body, headers=headers) as source:
                answer.status = source.response.status_code
                if answer.status != 200:
                    answer.error = _error_text(await source.response.aread())
                    return answer
                async for sent in source.aiter_sse():
                    if not sent.data or sent.data == _DONE:
                        continue
                    event = json.loads(sent.data)
                    if "error" in event:
                        answer.error = _message(event)
                        break
                    first = answer.times.first_s is None
                    _count(answer, event, clock())
                    if first and answer.times.first_s is not None:
                        on_first_token()
        except (httpx.TransportError, SSEError) as error:
            answer.error = f"{type(error).__name__}: {error}".rstrip(": ")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            answer.error = f"The stream has an event that is no completion ({type(error).__name__}: {error})"
        return answer

    async def _get(self, path: str) -> httpx.Response:
        try:
            return await self._http.get(path)
        except (httpx.TransportError, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise self._silent(error) from error

    def _silent(self, error: Exception) -> ReplayError:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        return ReplayError(f"The server at {self.url} does not answer ({reason}). Start it, or mend `--url`.")


def completion_body(model: str, prompt: list[int], tokens: int) -> bytes:
    """Returns the body of a streamed greedy completion of exactly `tokens` tokens, in vLLM's fields."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "min_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }
    return json.dumps(body, separators=(",", ":")).encode()


def _count(answer: Answer, event: Mapping[str, Any], now_s: float) -> None:
    """Adds an event's tokens by its running usage, or one token where the server sends usage only at the end."""
    usage = event.get("usage")
    if usage is None:
        answer.add(1 if event["choices"] else 0, now_s)
        return
    if event["choices"]:
        answer.add(usage["completion_tokens"] - answer.tokens, now_s)
    answer.tokens = usage["completion_tokens"]
    answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", answer.cached_tokens)


def _error_text(body: bytes) -> str:
    try:
        return _message(json.loads(body))
    except ValueError:
        return body.decode(errors="replace")[:200]


def _message(content: Any) -> str:
    error = content.get("error", content) if isinstance(content, dict) else content
    return str(error.get("message", error) if isinstance(error, dict) else error)
