"""What the API asks of whatever serves its requests: one engine's worker, or a cluster."""

from collections.abc import Sequence
from typing import Protocol

from serving.api.streams import Submission, TokenStream
from serving.conductor.types import Rejection
from serving.engine.types import EngineStats
from serving.request import Request


class BackendError(Exception):
    """Why a backend does not serve requests."""


class QueueFullError(BackendError):
    """More requests are open than the backend lets in; nothing was queued."""

    def __init__(self, asked: int, open_requests: int, limit: int) -> None:
        super().__init__(
            f"The server is full: {asked} more would join {open_requests} open requests, and it lets in {limit} "
            "(`--max_open_requests`). Retry later."
        )


class RejectedError(BackendError):
    """Admission control predicts that a request would miss its SLO.

    Attributes:
        rejection: the prediction, and when to retry.
    """

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(
            f"The request was rejected ({rejection.reason}): its TTFT would be {rejection.predicted_ttft_s:.3g} s and "
            f"its TBT {rejection.predicted_tbt_s:.3g} s. Retry after {rejection.retry_after_s:.3g} s."
        )
        self.rejection = rejection


class RequestFailedError(BackendError):
    """The backend raised on one request, which is lost; it goes on with the others."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"The server failed on this request: {type(error).__name__}: {error}")


class BackendFailedError(BackendError):
    """The backend raised: its requests are lost, and it takes no more."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"The engine failed and must be restarted: {type(error).__name__}: {error}")


class Observer(Protocol):
    """Receives a backend's reports, on the event loop."""

    def stepped(self, stats: EngineStats) -> None: ...
    def token(self, stream: TokenStream) -> None: ...
    def ended(self, stream: TokenStream) -> None: ...


class Backend(Protocol):
    """Serves requests. Every method is called from the event loop, and none blocks it."""

    @property
    def failure(self) -> BackendFailedError | None:
        """Why the backend no longer serves, if it failed."""
        ...

    @property
    def max_open_requests(self) -> int:
        """Most requests that may be open at once, and so most choices of one submission."""
        ...

    @property
    def open_requests(self) -> int:
        """Requests that were let in and have not ended."""
        ...

    def start(self, observer: Observer) -> None:
        """Begins to serve, and to report to `observer` on the running event loop."""
        ...

    async def submit(self, requests: Sequence[Request]) -> Submission:
        """Queues all of `requests` or none, and returns once they are accepted; tokens arrive in the submission.

        Raises QueueFullError, RejectedError, RequestFailedError, BackendFailedError, or RequestRefusedError for a
        request that can never be served. `Submission.take` raises a BackendError that happens later.
        """
        ...

    def end(self, stream: TokenStream, finish_reason: str) -> None:
        """Ends one request with its answer's `finish_reason`, and aborts it if it still runs; idempotent."""
        ...

    def close(self, submission: Submission) -> None:
        """Ends whichever requests of `submission` have not ended, as aborted; idempotent."""
        ...

    async def stop(self) -> None:
        """Aborts all open requests and returns once nothing runs."""
        ...
