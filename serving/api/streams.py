"""Tokens of requests on their way from the backend to the coroutine that answers them."""

import asyncio
from collections.abc import Sequence

from serving.engine.types import TokenEvent
from serving.request import Request
from serving.token_times import TokenTimes


class TokenStream:
    """The tokens of one request, as they come.

    Attributes:
        request: what the backend generates.
        submission: the requests that `request` was submitted with.
        times: arrival times of the tokens, in seconds on the backend's clock.
        answered_tokens: tokens that the answer holds so far. The backend may run ahead of a stop string.
        finish_reason: of the answer: `stop`, `length` or `abort`; `None` until the request ends.
    """

    def __init__(self, request: Request, submission: "Submission") -> None:
        self.request = request
        self.submission = submission
        self.times = TokenTimes()
        self.answered_tokens = 0
        self.finish_reason: str | None = None

    def put(self, event: TokenEvent, now_s: float) -> None:
        """Adds a token that came at `now_s`."""
        if self.times.first_s is None:
            self.times.cached_tokens = event.cached_tokens
        self.times.record(now_s)
        self.submission.put(self, event)


class Submission:
    """The choices of one HTTP request, which are answered together. Only the event loop touches it.

    Attributes:
        streams: one per request, in the order of the requests.
        submitted_s: when the requests were submitted, in seconds on the backend's clock.
    """

    def __init__(self, requests: Sequence[Request], submitted_s: float) -> None:
        self.streams = [TokenStream(request, self) for request in requests]
        self.submitted_s = submitted_s
        self._not_accepted = len(requests)
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrived: list[tuple[TokenStream, TokenEvent]] = []
        self._ready = asyncio.Event()
        self._error: Exception | None = None

    async def accepted(self) -> None:
        """Returns once the backend has queued every request. Raises the error given to `fail`."""
        await self._accepted

    async def take(self) -> list[tuple[TokenStream, TokenEvent]]:
        """Returns every event since the last call, at least one. Raises the error given to `fail`."""
        await self._ready.wait()
        if self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, []
        self._ready.clear()
        return arrived

    def accept_one(self) -> None:
        """Records that the backend has queued one more of the requests."""
        self._not_accepted -= 1
        if self._not_accepted == 0 and not self._accepted.done():
            self._accepted.set_result(None)

    def put(self, stream: TokenStream, event: TokenEvent) -> None:
        """Hands a token of `stream` to `take`."""
        self._arrived.append((stream, event))
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """Ends the submission: `accepted` and `take` raise `error`."""
        if not self._accepted.done():
            self._accepted.set_exception(error)
        self._error = error
        self._ready.set()
