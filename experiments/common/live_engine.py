"""An engine in this process that serves a trace in open loop, against a clock: the live side of `fidelity`."""

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from serving.engine import RequestRefusedError, TokenEvent
from serving.engine.engine import Engine
from serving.request import Request, TraceRequest
from serving.simulator.calibration import StepSample
from serving.simulator.dry_engine import DryEngine
from serving.token_times import TokenTimes
from serving.workload.outcomes import COMPLETED, REJECTED, RequestOutcome, tbt_s
from serving.workload.prompts import BYTE_IDS, PromptWriter
from serving.workload.requests import Trace


class Clock(Protocol):
    """Seconds since it was made."""

    def now(self) -> float: ...
    def wait_until(self, seconds: float) -> None: ...


class WallClock:
    """Time as users see it."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def wait_until(self, seconds: float) -> None:
        time.sleep(max(0.0, seconds - self.now()))


class CpuClock:
    """Time that stands still while other processes have the core, and jumps over waiting: a machine of one's own.

    It is the wall clock of an undisturbed machine only if this process computes on one core.
    """

    def __init__(self) -> None:
        self._start = time.process_time()

    def now(self) -> float:
        return time.process_time() - self._start

    def wait_until(self, seconds: float) -> None:
        self._start -= max(0.0, seconds - self.now())


CLOCKS: dict[str, Callable[[], Clock]] = {"wall": WallClock, "cpu": CpuClock}


@dataclasses.dataclass(frozen=True, slots=True)
class MeasuredStep:
    """One step of a live engine: the requests that it was given just before, and how long it took on either clock."""

    added: tuple[Request, ...]
    wall_s: float
    cpu_s: float

    def seconds(self, clock: str) -> float:
        return self.wall_s if clock == "wall" else self.cpu_s


def timed_step(engine: Engine, added: Iterable[Request] = ()) -> tuple[list[TokenEvent], MeasuredStep]:
    """Computes one step of `engine`."""
    wall, cpu = time.perf_counter(), time.process_time()
    events = engine.step()
    return events, MeasuredStep(tuple(added), time.perf_counter() - wall, time.process_time() - cpu)


def step_samples(dry: DryEngine, steps: Sequence[MeasuredStep], clock: str) -> list[StepSample]:
    """What each of `steps` computed, found by planning them again on `dry`, with what it took."""
    samples = []
    for step in steps:
        for request in step.added:
            dry.add(request)
        work = dry.plan()
        if work is None:
            raise RuntimeError("The engine computed a step that its scheduler does not plan.")
        dry.complete()
        samples.append(StepSample(work, step.seconds(clock)))
    return samples


class LiveEngine:
    """Plays traces on an engine in open loop. `steps` are those of the last trace."""

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], Clock] = WallClock,
        *,
        seed: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> None:
        """`seed` is that of the prompts' token ids; `progress` is told the number of requests that ended."""
        self.steps: list[MeasuredStep] = []
        self._engine, self._clock, self._seed, self._progress = engine, clock, seed, progress

    def serve(self, trace: Trace) -> list[RequestOutcome]:
        # Made before the clock starts, salted by the run: an earlier run of the same prompts is no cache hit.
        salt = str(time.monotonic_ns())
        prompts = PromptWriter(BYTE_IDS, trace.block_size, self._seed)
        requests = [
            dataclasses.replace(request.with_prompt(prompts.prompt(request)), salt=salt) for request in trace.requests
        ]
        coming = deque(zip(trace.requests, requests, strict=True))
        running: dict[str, tuple[TraceRequest, TokenTimes]] = {}
        outcomes: dict[str, RequestOutcome] = {}
        self.steps = []
        clock = self._clock()
        while coming or self._engine.has_work:
            now = clock.now()
            added = []
            while coming and coming[0][0].arrival_s <= now:
                request, prompt = coming.popleft()
                try:
                    self._engine.add(prompt)
                except RequestRefusedError:
                    outcomes[request.id] = _refused(request, now)
                else:
                    running[prompt.id] = (request, TokenTimes())
                    added.append(prompt)
            if not self._engine.has_work:
                if coming:
                    clock.wait_until(coming[0][0].arrival_s)
                continue
            events, step = timed_step(self._engine, added)
            self.steps.append(step)
            now = clock.now()
            for event in events:
                if outcome := _token(*running[event.request_id], event, now):
                    del running[event.request_id]
                    outcomes[outcome.id] = outcome
                    if self._progress:
                        self._progress(len(outcomes))
        return [outcomes[request.id] for request in trace.requests]


def _token(request: TraceRequest, times: TokenTimes, event: TokenEvent, now: float) -> RequestOutcome | None:
    """Records a token; returns the outcome of the request with its last token."""
    if times.first_s is None:
        times.cached_tokens = event.cached_tokens
    times.record(now)
    if event.finish_reason is None:
        return None
    assert times.first_s is not None
    return RequestOutcome(
        id=request.id,
        arrival_s=request.arrival_s,
        input_tokens=request.input_tokens,
        output_tokens=times.tokens,
        ttft_s=times.first_s - request.arrival_s,
        tbt_s=tbt_s(times.gaps_s),
        hit_tokens=times.cached_tokens,
        prefill="live",
        decode="live",
        outcome=COMPLETED,
        finished_s=now,
    )


def _refused(request: TraceRequest, now: float) -> RequestOutcome:
    return RequestOutcome(
        id=request.id,
        arrival_s=request.arrival_s,
        input_tokens=request.input_tokens,
        output_tokens=0,
        ttft_s=None,
        tbt_s=None,
        hit_tokens=0,
        prefill="",
        decode="",
        outcome=REJECTED,
        finished_s=now,
    )
