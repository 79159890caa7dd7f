"""The backend of one engine: a thread that owns the engine, and the event loop's side of it.

The engine is synchronous, single-threaded and reads no clock. One thread runs the engine's steps; requests and aborts
reach the thread through a queue between two steps, and the events of each step return to the event loop in one call,
stamped with the time at which the step ended.
"""

import asyncio
import dataclasses
import logging
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from model.sampling_params import SamplingParamsError
from serving.api.backend import BackendFailedError, Observer, QueueFullError, RequestFailedError
from serving.api.streams import Submission, TokenStream
from serving.engine.errors import RequestRefusedError
from serving.engine.types import EngineStats, TokenEvent
from serving.request import Request

_logger = logging.getLogger(__name__)


class ServedEngine(Protocol):
    """What the worker needs of an engine; `serving.engine.engine.Engine` is one."""

    @property
    def has_work(self) -> bool: ...
    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> bool: ...
    def step(self) -> list[TokenEvent]: ...
    def stats(self) -> EngineStats: ...


@dataclasses.dataclass(frozen=True)
class _Abort:
    request_id: str


@dataclasses.dataclass(frozen=True)
class _Stop:
    pass


_Command = Request | _Abort | _Stop


class EngineWorker:
    """A `Backend` that runs one engine in a thread of its own.

    Args:
        engine: warmed up; nobody else may touch it from `start` on.
        max_open_requests: open requests beyond which `submit` raises QueueFullError.
    """

    def __init__(self, engine: ServedEngine, *, max_open_requests: int) -> None:
        self._engine = engine
        self.max_open_requests = max_open_requests
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._open: dict[str, TokenStream] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self.failure: BackendFailedError | None = None

    @property
    def open_requests(self) -> int:
        return len(self._open)

    def start(self, observer: Observer) -> None:
        self._observer = observer
        self._loop = asyncio.get_running_loop()
        self._thread.submit(self._run).add_done_callback(self._returned)

    async def submit(self, requests: Sequence[Request]) -> Submission:
        if self.failure is not None:
            raise self.failure
        if len(self._open) + len(requests) > self.max_open_requests:
            raise QueueFullError(len(requests), len(self._open), self.max_open_requests)
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
        for stream in submission.streams:
            self.end(stream, "abort")

    def end(self, stream: TokenStream, finish_reason: str) -> None:
        if stream.finish_reason is not None:
            return
        stream.finish_reason = finish_reason
        if self._open.pop(stream.request.id, None) is not None:
            self._commands.put(_Abort(stream.request.id))
        self._observer.ended(stream)

    async def stop(self) -> None:
        for stream in list(self._open.values()):
            self.end(stream, "abort")
        self._commands.put(_Stop())
        await asyncio.to_thread(self._thread.shutdown)

    def _run(self) -> None:
        """Runs the engine's thread: takes commands, computes a step, reports its events; sleeps without work."""
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
            self._report(self._stepped, events, self._engine.stats(), time.monotonic())

    def _next_commands(self) -> list[_Command]:
        commands = [] if self._engine.has_work else [self._commands.get()]
        while not self._commands.empty():
            commands.append(self._commands.get())
        return commands

    def _add(self, request: Request) -> None:
        try:
            self._engine.add(request)
        except (RequestRefusedError, SamplingParamsError) as error:
            self._report(self._refused, request.id, RequestRefusedError(str(error)))
        except Exception as error:
            # `add` touches no other request, so that a fault in it costs this one alone.
            _logger.exception("The engine failed to add request %s.", request.id)
            self._engine.abort(request.id)
            self._report(self._refused, request.id, RequestFailedError(error))
        else:
            self._report(self._accepted, request.id)

    def _report(self, callback: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(callback, *arguments)

    def _accepted(self, request_id: str) -> None:
        if stream := self._open.get(request_id):
            stream.submission.accept_one()

    def _refused(self, request_id: str, error: Exception) -> None:
        if stream := self._open.pop(request_id, None):
            stream.finish_reason = "refused"
            stream.submission.fail(error)

    def _stepped(self, events: Sequence[TokenEvent], stats: EngineStats, now_s: float) -> None:
        self._observer.stepped(stats)
        for event in events:
            # A request that was aborted during the step may still have a token in it.
            if stream := self._open.get(event.request_id):
                stream.put(event, now_s)
                self._observer.token(stream)
                if event.finish_reason is not None:
                    # Whoever reads the answer ends it: a stop string may end it before its last tokens.
                    del self._open[event.request_id]

    def _returned(self, running: Future[None]) -> None:
        """Reports the exception that ended `_run`, if one did; called in the engine's thread."""
        error = running.exception()
        if error is not None:
            self._report(self._failed, error)

    def _failed(self, error: BaseException) -> None:
        _logger.error("The engine failed; %d open requests are lost.", len(self._open), exc_info=error)
        self.failure = BackendFailedError(error)
        self.failure.__cause__ = error
        for stream in list(self._open.values()):
            stream.submission.fail(self.failure)
            self.end(stream, "abort")
