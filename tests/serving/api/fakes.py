"""An engine and a backend that fail or reject when they are told to: for what real ones cannot be made to show."""

import asyncio
import time
from collections.abc import Sequence

from serving.api.backend import BackendFailedError, Observer, RejectedError
from serving.api.streams import Submission, TokenStream
from serving.conductor.types import Rejection
from serving.engine.errors import RequestRefusedError
from serving.engine.types import EngineStats, TokenEvent
from serving.request import Request


class ScriptedEngine:
    """Repeats each prompt, one token per step, until `max_tokens`.

    Attributes:
        aborted: ids that were aborted while running.
        add_error: what `add` raises; `None` queues the request.
        breaks_at: the step from which on `step` raises; `None` never does.
        step_s: how long a step takes.
        steps: steps so far.
    """

    def __init__(self, *, step_s: float = 0.0, max_model_len: int = 2000) -> None:
        self.aborted: list[str] = []
        self.add_error: Exception | None = None
        self.breaks_at: int | None = None
        self.steps = 0
        self.step_s = step_s
        self._max_model_len = max_model_len
        self._running: dict[str, tuple[Request, int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def add(self, request: Request) -> None:
        if self.add_error is not None:
            raise self.add_error
        if len(request.prompt) > self._max_model_len:
            raise RequestRefusedError(f"{len(request.prompt)} tokens never fit.")
        self._running[request.id] = (request, 0)

    def abort(self, request_id: str) -> bool:
        if self._running.pop(request_id, None) is None:
            return False
        self.aborted.append(request_id)
        return True

    def step(self) -> list[TokenEvent]:
        self.steps += 1
        if self.breaks_at is not None and self.steps >= self.breaks_at:
            raise RuntimeError("the device is gone")
        time.sleep(self.step_s)
        return [self._next(request, count) for request, count in list(self._running.values())]

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._running), pages_total=10, pages_used=len(self._running), steps=self.steps)

    def _next(self, request: Request, count: int) -> TokenEvent:
        token = request.prompt[count % len(request.prompt)]
        self._running[request.id] = (request, count + 1)
        finish = "length" if count + 1 == request.sampling.max_tokens else None
        if finish:
            del self._running[request.id]
        top = tuple((token + i, -1.0 - i) for i in range(request.sampling.logprobs or 0))
        return TokenEvent(request_id=request.id, token=token, logprob=-0.5, top_logprobs=top, finish_reason=finish)


class FakeBackend:
    """A backend without an engine or a thread: repeats each prompt, one token per turn of the event loop.

    Attributes:
        rejection: why the next submission is rejected; `None` serves it.
        rejects_after: tokens of each request after which `rejection` comes; 0 rejects at once.
        ended: ids of the requests that ended, with their finish reasons.
    """

    def __init__(self, *, rejection: Rejection | None = None, rejects_after: int = 0) -> None:
        self.failure: BackendFailedError | None = None
        self.max_open_requests = 8
        self.rejection = rejection
        self.rejects_after = rejects_after
        self.ended: list[tuple[str, str]] = []
        self._open: dict[str, TokenStream] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def start(self, observer: Observer) -> None:
        self._observer = observer

    async def submit(self, requests: Sequence[Request]) -> Submission:
        if self.rejection is not None and self.rejects_after == 0:
            raise RejectedError(self.rejection)
        submission = Submission(requests, time.monotonic())
        for stream in submission.streams:
            self._open[stream.request.id] = stream
            submission.accept_one()
        task = asyncio.create_task(self._generate(submission))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return submission

    def end(self, stream: TokenStream, finish_reason: str) -> None:
        if stream.finish_reason is None:
            stream.finish_reason = finish_reason
            self._open.pop(stream.request.id, None)
            self.ended.append((stream.request.id, finish_reason))
            self._observer.ended(stream)

    def close(self, submission: Submission) -> None:
        for stream in submission.streams:
            self.end(stream, "abort")

    async def stop(self) -> None:
        for stream in list(self._open.values()):
            self.end(stream, "abort")
        await asyncio.gather(*self._tasks)

    async def _generate(self, submission: Submission) -> None:
        count = 0
        while any(stream.request.id in self._open for stream in submission.streams):
            if self.rejection is not None and count == self.rejects_after:
                submission.fail(RejectedError(self.rejection))
                return
            for stream in submission.streams:
                if stream.request.id in self._open:
                    self._token(stream, count)
            count += 1
            await asyncio.sleep(0)

    def _token(self, stream: TokenStream, count: int) -> None:
        request = stream.request
        token = request.prompt[count % len(request.prompt)]
        last = count + 1 == request.sampling.max_tokens
        finish = "length" if last else None
        stream.put(TokenEvent(request_id=request.id, token=token, finish_reason=finish), time.monotonic())
        self._observer.token(stream)
        if last:
            del self._open[request.id]
