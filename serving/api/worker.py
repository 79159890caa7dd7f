"""The thread that owns the engine, and the event loop's side of it.

The engine is synchronous, single-threaded and reads no clock. One thread runs its steps; requests and aborts reach it
through a queue between two steps, and the events of each step come back to the event loop in one call, stamped with the
time at which the step ended. Everything public here is called from the event loop.
"""

import asyncio
import dataclasses
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from serving.api.streams import Submission, TokenStream
from serving.engine.errors import RequestRefusedError
from serving.engine.types import EngineStats, Request, TokenEvent


class ServedEngine(Protocol):
    """What the worker needs of an engine; `serving.engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> bool: ...
    def step(self) -> list[TokenEvent]: ...
    def stats(self) -> EngineStats: ...


class Observer(Protocol):
    """Told on the event loop what becomes of requests."""

    def stepped(self, stats: EngineStats) -> None: ...
    def token(self, stream: TokenStream) -> None: ...
    def ended(self, stream: TokenStream, now_s: float) -> None: ...


class QueueFullError(Exception):
    """More requests are open than the server lets in; nothing was queued."""

    def __init__(self, asked: int, open_requests: int, limit: int) -> None:
        super().__init__(
            f"The server is full: {asked} more would join {open_requests} open requests, and it lets in {limit} "
            "(`--max_open_requests`). Retry later."
        )


class EngineFailedError(Exception):
    """The engine raised: its requests are lost, and it takes no more."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"The engine failed and must be restarted: {type(error).__name__}: {error}")


@dataclasses.dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclasses.dataclass(frozen=True)
class _Stop:
    pass


_Command = Request | _Abort | _Stop


class EngineWorker:
    """Runs an engine in a thread of its own.

    Attributes:
        failure: why the engine no longer runs, if it failed.
    """

    def __init__(self, engine: ServedEngine, observer: Observer, *, max_open_requests: int) -> None:
        self._engine = engine
        self._observer = observer
        self._limit = max_open_requests
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._open: dict[str, TokenStream] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.failure: EngineFailedError | None = None

    @property
    def open_requests(self) -> int:
        """Requests that were let in and have not ended."""
        return len(self._open)

    def start(self) -> None:
        """Starts the thread; its news come to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.submit(self._run).add_done_callback(self._returned)

    async def submit(self, requests: Sequence[Request]) -> Submission:
        """Queues all of `requests` or none of them, and returns once the engine has them.

        Raises QueueFullError, EngineFailedError, or the engine's RequestRefusedError.
        """
        if self.failure is not None:
            raise self.failure
        if len(requests) > self._limit:
            raise RequestRefusedError(
                f"{len(requests)} choices were asked for at once, and the server lets in {self._limit} open requests "
                "(`--max_open_requests`). Ask for fewer."
            )
        if len(self._open) + len(requests) > self._limit:
            raise QueueFullError(len(requests), len(self._open), self._limit)
        submission = Submission(requests, time.monotonic())
        for stream in submission.streams:
            self._open[stream.request.id] = stream
            self._commands.put(stream.request)
        queued = False
        try:
            await submission.accepted()
            queued = True
        finally:
            if not queued:
                self.close(submission)
        return submission

    def close(self, submission: Submission) -> None:
        """Aborts whichever requests of `submission` have not ended; any number of calls do what one does."""
        for stream in submission.streams:
            self.abort(stream)

    def abort(self, stream: TokenStream, finish_reason: str = "abort") -> None:
        """Ends one request now, if it has not ended, whatever it still had to say."""
        if self._open.pop(stream.request.id, None) is not None:
            stream.finish_reason = finish_reason
            self._commands.put(_Abort(stream.request.id))
            self._observer.ended(stream, time.monotonic())

    async def stop(self) -> None:
        """Aborts what is still open and ends the thread after its current step."""
        for stream in list(self._open.values()):
            self.abort(stream)
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.shutdown)

    def _run(self) -> None:
        """The engine's thread: takes commands, computes a step, tells its events; sleeps while there is no work."""
        while True:
            for command in self._next_commands():
                match command:
                    case _Stop():
                        return
                    case _Abort(request_id):
                        self._engine.abort(request_id)
                    case Request():
                        self._add(command)
            events = self._engine.step() if self._engine.has_work else []
            self._tell(self._stepped, events, self._engine.stats(), time.monotonic())

    def _next_commands(self) -> list[_Command]:
        commands = [] if self._engine.has_work else [self._commands.get()]
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except RequestRefusedError as error:
            self._tell(self._refused, request.id, error)
        else:
            self._tell(self._accepted, request.id)

    def _tell(self, news: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(news, *arguments)

    def _accepted(self, request_id: str) -> None:
        if stream := self._open.get(request_id):
            stream.submission.accept_one()

    def _refused(self, request_id: str, error: RequestRefusedError) -> None:
        if stream := self._open.pop(request_id, None):
            stream.submission.fail(error)

    def _stepped(self, events: Sequence[TokenEvent], stats: EngineStats, now_s: float) -> None:
        self._observer.stepped(stats)
        for event in events:
            # A request that was aborted during the step may still have had a token in it.
            if stream := self._open.get(event.request_id):
                stream.put(event, now_s)
                self._observer.token(stream)
                if stream.finish_reason is not None:
                    del self._open[event.request_id]
                    self._observer.ended(stream, now_s)

    def _returned(self, running: Future[None]) -> None:
        """The thread's last act, whether `_run` returned or raised."""
        error = running.exception()
        if error is not None:
            self._tell(self._failed, error)

    def _failed(self, error: BaseException) -> None:
        self.failure = EngineFailedError(error)
        self.failure.__cause__ = error
        for stream in self._open.values():
            stream.submission.fail(self.failure)
            self._observer.ended(stream, time.monotonic())
        self._open.clear()
