"""A coupled node that runs the engine's own scheduler: chunked prefill beside decodes within one token budget.

`CoupledNode` approximates any engine in closed form; this one is ours, step for step, with the cost of each step's
shape. Runs of decode steps that differ only in their contexts are still one event; where the calibration knows how far
steps scatter, each is drawn from that, and runs end after `_LONGEST_RUN` steps.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

from serving.request import TraceRequest
from serving.simulator.batch import Timer
from serving.simulator.cache import NodeCache
from serving.simulator.dry_engine import DryEngine, SequenceProgress
from serving.simulator.errors import SimulatorError
from serving.simulator.gaps import Progression
from serving.simulator.performance import Performance
from serving.simulator.request_state import RequestState
from serving.simulator.step_runs import EvenRun, NoisyRun, StepRun
from serving.simulator.steps import StepWork

# A sleeping engine wakes a little after an arrival, and finds everything that arrived with it.
_WAKE_S = 1e-4
_LONGEST_RUN = 64


@dataclasses.dataclass(slots=True)
class _Member:
    state: RequestState
    last_token_s: float = 0.0
    gaps: list[Progression] = dataclasses.field(default_factory=list)


class EngineNode:
    """An engine as the cluster sees it. A `PrefillInstance` and a `DecodeInstance`."""

    def __init__(
        self,
        name: str,
        index: int,
        performance: Performance,
        at: Timer,
        finished: Callable[[RequestState, float], None],
        cache: NodeCache,
        prefilled: Callable[[RequestState, float], None],
        prompt: Callable[[TraceRequest], Sequence[int]],
        seed: int,
    ) -> None:
        if performance.engine is None:
            raise SimulatorError("This performance model has no engine in it; calibrate one.")
        self.name, self.index, self.cache = name, index, cache
        self.costs, self.times = performance.costs, performance.decode_times
        self.kv_capacity_tokens = 1 << 60  # An engine queues whatever it cannot hold yet.
        self.busy_s = 0.0
        self.assigned = self.assigned_tokens = 0
        self.present = self.present_tokens = 0
        self._at, self._finished, self._prefilled, self._prompt = at, finished, prefilled, prompt
        self._model = performance.engine
        self._engine = DryEngine(self._model)
        self._members: dict[str, _Member] = {}
        self._prompts_s = 0.0
        self._queued = 0
        self._start_s = 0.0
        self._steps: StepRun = EvenRun(0.0, 0.0)
        self._planned = 0
        self._rng = random.Random(f"{seed} {name}")
        self._version = 0
        self._awake = False

    @property
    def queued(self) -> int:
        return self._queued

    def queue_s(self, now: float, queue_key: float) -> float:
        """Work of the prompts that are not computed yet; the engine orders them by arrival."""
        del now, queue_key
        return self._prompts_s

    def fetch_wait_s(self, now: float, source: int) -> float:
        """Coupled nodes never fetch."""
        del now, source
        return float("inf")

    def assign(self, state: RequestState, sign: int) -> float:
        """Counts a promise (+1) or its end (-1); returns the load that orders decode instances: predicted TBT, s."""
        self.assigned += sign
        self.assigned_tokens += sign * state.request.input_tokens
        return self.times.decode_s(self.assigned, self.assigned_tokens)

    def enqueue(self, state: RequestState, now: float) -> None:
        request = state.request
        self._members[request.id] = _Member(state)
        self._prompts_s += state.placement.predicted_prefill_s
        self._queued += 1
        self._engine.add(request.with_prompt(self._prompt(request)))
        if not self._awake:
            self._awake = True
            self._at(now + _WAKE_S, self._begin, self._version)
        elif self._planned:
            done = self._steps.within(now - self._start_s) + 1
            if done < self._planned:
                self._run(done)

    def join(self, state: RequestState, now: float) -> None:
        """The prompt is computed and the request decodes on: the engine has it in its batch already."""
        del now
        self.present += 1
        self.present_tokens += state.request.input_tokens

    def fail(self, now: float) -> list[RequestState]:
        """Drops everything; returns what was here, each with what it had got until now as its past."""
        if self._planned:
            done = min(self._steps.within(now - self._start_s), self._planned - 1)
            end_s = self._start_s + self._steps.seconds(done)
            for progress in self._engine.complete(done) if done else ():
                self._progressed(progress, done, end_s)
        for member in self._members.values():
            if member.state.first_token_s > 0:
                member.state.remember(member.gaps, member.last_token_s)
        lost = [member.state for member in self._members.values()]
        self._members.clear()
        self._engine = DryEngine(self._model)
        self._version += 1
        self._planned, self._awake = 0, False
        self._prompts_s, self._queued = 0.0, 0
        self.present = self.present_tokens = 0
        return lost

    def _begin(self, version: int, now: float) -> None:
        """Plans the next step, or sleeps."""
        if version != self._version:
            return
        work = self._engine.plan()
        self._start_s, self._planned = now, 0
        if work is None:
            self._awake = False
            return
        self._run(self._time(work, self._engine.steps_alike()))

    def _time(self, work: StepWork, steps: int) -> int:
        """Sets how long the next `steps` steps take, or as many of them as it returns."""
        model = self._model.steps
        even = EvenRun(model.seconds(work), model.decode_token * work.decodes)
        noise = model.noise_of(work)
        if not noise:
            self._steps = even
            return steps
        steps = min(steps, _LONGEST_RUN)
        self._steps = NoisyRun(even, self._rng.choices(noise, k=steps))
        return steps

    def _run(self, steps: int) -> None:
        self._planned = steps
        self._version += 1
        self._at(self._start_s + self._steps.seconds(steps), self._ended, self._version)

    def _ended(self, version: int, now: float) -> None:
        if version != self._version:
            return
        steps = self._planned
        self.busy_s += self._steps.seconds(steps)
        for progress in self._engine.complete(steps):
            self._progressed(progress, steps, now)
        self._begin(version, now)

    def _progressed(self, progress: SequenceProgress, steps: int, now: float) -> None:
        member = self._members[progress.request_id]
        state = member.state
        if progress.first:
            self._first_token(state, progress.cached_tokens, now)
        else:
            member.gaps += self._steps.gaps(steps, self._start_s - member.last_token_s)
        member.last_token_s = now
        if progress.finished:
            del self._members[progress.request_id]
            if not progress.first:
                self.present -= 1
                self.present_tokens -= state.request.input_tokens
                state.tbt_s = state.longest_gaps_s(member.gaps)
                self._finished(state, now)

    def _first_token(self, state: RequestState, cached_tokens: int, now: float) -> None:
        self._queued -= 1
        self._prompts_s = self._prompts_s - state.placement.predicted_prefill_s if self._queued else 0.0
        state.compute_s = state.prefill_s = self.costs.prefill_s(state.request.input_tokens, cached_tokens)
        state.started_s = now - state.prefill_s
        state.placement = dataclasses.replace(state.placement, reused_tokens=cached_tokens)
        joined = self.present
        self._prefilled(state, now)
        if state.request.output_tokens > 1 and self.present == joined:
            # Refused after its prefill.
            del self._members[state.request.id]
            self._engine.abort(state.request.id)
