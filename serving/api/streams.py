"""The tokens of requests on their way from the engine's thread to the coroutine that answers them."""

import asyncio
from collections.abc import Sequence

from serving.engine.types import Request, TokenEvent


class TokenStream:
    """What has come of one request, and when. Times are in seconds on the worker's clock.

    Attributes:
        request: what was asked of the engine.
        submission: the requests that it was sent with.
        first_token_s: when the first token came.
        last_token_s: when the latest token came.
        gaps_s: seconds between consecutive tokens.
        cached_tokens: prompt tokens whose KV came from the prefix cache.
        finish_reason: why it ended, once it has.
    """

    def __init__(self, request: Request, submission: "Submission") -> None:
        self.request = request
        self.submission = submission
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.gaps_s: list[float] = []
        self.cached_tokens = 0
        self.finish_reason: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens generated so far."""
        return 0 if self.first_token_s is None else len(self.gaps_s) + 1

    def put(self, event: TokenEvent, now_s: float) -> None:
        """One more token, at `now_s`."""
        if self.last_token_s is None:
            self.first_token_s = now_s
            self.cached_tokens = event.cached_tokens
        else:
            self.gaps_s.append(now_s - self.last_token_s)
        self.last_token_s = now_s
        self.finish_reason = event.finish_reason
        self.submission.put(self, event)


class Submission:
    """Requests that are answered together: the choices of one HTTP request. Belongs to the event loop.

    Attributes:
        streams: one per request, in the order of the requests.
        submitted_s: when they were sent to the engine.
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
        """Returns once the engine has queued every request; raises what `fail` was given."""
        await self._accepted

    async def take(self) -> list[tuple[TokenStream, TokenEvent]]:
        """Every event since the last call, at least one: a slow reader gets more at a time, not a longer queue.

        Raises what `fail` was given.
        """
        await self._ready.wait()
        if self._error is not None:
            raise self._error
        arrived, self._arrived = self._arrived, []
        self._ready.clear()
        return arrived

    def accept_one(self) -> None:
        """The engine has queued one more of the requests."""
        self._not_accepted -= 1
        if self._not_accepted == 0 and not self._accepted.done():
            self._accepted.set_result(None)

    def put(self, stream: TokenStream, event: TokenEvent) -> None:
        """One more token of `stream`."""
        self._arrived.append((stream, event))
        self._ready.set()

    def fail(self, error: Exception) -> None:
        """No more events will come; `error` is raised to whoever waits for one, or for acceptance."""
        if not self._accepted.done():
            self._accepted.set_exception(error)
        self._error = error
        self._ready.set()
