"""A coupled node that runs the engine's own scheduler: chunked prefill beside decodes within one token budget.

`CoupledNode` approximates any engine in closed form; this one is ours, step for step, with the cost of each step's
shape. Runs of decode steps that differ only in their contexts are still one event; where the calibration knows how far
steps scatter, each is drawn from that, and runs end after `_LONGEST_RUN` steps.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

from serving.cluster.gaps import Progression
from serving.cluster.instance import Events
from serving.conductor import TimeModel
from serving.request import TraceRequest
from serving.simulator.clock import Timer
from serving.simulator.dry_engine import DryEngine, SequenceProgress
from serving.simulator.prefill_node import Prefilled
from serving.simulator.simulated_request import SimulatedRequest
from serving.simulator.step_runs import EvenRun, NoisyRun, StepRun
from serving.simulator.steps import EngineModel, StepWork

# A sleeping engine wakes a little after an arrival, and finds everything that arrived with it.
_WAKE_S = 1e-4
_LONGEST_RUN = 64


@dataclasses.dataclass(slots=True)
class _Member:
    state: SimulatedRequest
    last_token_s: float | None = None
    gaps: list[Progression] = dataclasses.field(default_factory=list)


class EngineNode:
    """An engine as the cluster sees it: it takes prompts (`enqueue`) and decodes them by itself."""

    def __init__(
        self,
        *,
        name: str,
        index: int,
        model: EngineModel,
        costs: TimeModel,
        at: Timer,
        events: Events,
        prefilled: Prefilled,
        prompt: Callable[[TraceRequest], Sequence[int]],
        seed: int,
    ) -> None:
        """`prompt` makes a request's token ids; `costs` tell the device time of its prefill."""
        self.index, self.costs = index, costs
        self._at, self._events, self._prefilled, self._prompt = at, events, prefilled, prompt
        self._model = model
        self._engine = DryEngine(model)
        self._members: dict[str, _Member] = {}
        self._present_tokens = 0
        self._start_s = 0.0
        self._steps: StepRun = EvenRun(0.0, 0.0)
        self._planned = 0
        self._rng = random.Random(f"{seed} {name}")
        self._version = 0
        self._awake = False

    def enqueue(self, state: SimulatedRequest, now: float) -> None:
        request = state.request
        self._members[request.id] = _Member(state)
        self._engine.add(request.with_prompt(self._prompt(request)))
        if not self._awake:
            self._awake = True
            self._at(now + _WAKE_S, self._begin, self._version)
        elif self._planned:
            done = self._steps.within(now - self._start_s) + 1
            if done < self._planned:
                self._run(done)

    def join(self, state: SimulatedRequest, now: float) -> None:
        """The prompt is computed and the request decodes on: the engine has it in its batch already."""
        del now
        self._load(state.request.input_tokens)

    def withdraw(self, request_id: str, now: float) -> None:
        """Drops a request, if it is here."""
        del now
        if self._members.pop(request_id, None) is not None:
            self._engine.abort(request_id)

    def fail(self, now: float) -> None:
        """Drops everything, after a report of the tokens that came until now."""
        if self._planned:
            done = min(self._steps.within(now - self._start_s), self._planned - 1)
            end_s = self._start_s + self._steps.seconds(done)
            for progress in self._engine.complete(done) if done else ():
                self._progressed(progress, done, end_s)
        for member in self._members.values():
            if member.last_token_s is not None:
                self._events.tokens(member.state.request.id, member.gaps, member.last_token_s)
        self._members.clear()
        self._engine = DryEngine(self._model)
        self._version += 1
        self._planned, self._awake = 0, False
        self._present_tokens = 0

    def _load(self, tokens: int) -> None:
        self._present_tokens += tokens
        self._events.loaded(self.index, self._present_tokens)

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
        for progress in self._engine.complete(steps):
            self._progressed(progress, steps, now)
        self._begin(version, now)

    def _progressed(self, progress: SequenceProgress, steps: int, now: float) -> None:
        member = self._members[progress.request_id]
        state, last_token_s = member.state, member.last_token_s
        member.last_token_s = now
        if last_token_s is None:
            if progress.finished:
                del self._members[progress.request_id]
            self._first_token(state, progress.cached_tokens, now)
            return
        member.gaps += self._steps.gaps(steps, self._start_s - last_token_s)
        if progress.finished:
            del self._members[progress.request_id]
            self._load(-state.request.input_tokens)
            self._events.finished(state.request.id, state.attempt, member.gaps, now)

    def _first_token(self, state: SimulatedRequest, cached_tokens: int, now: float) -> None:
        state.compute_s = state.prefill_s = self.costs.prefill_s(state.request.input_tokens, cached_tokens)
        state.started_s = now - state.prefill_s
        state.reused_tokens = cached_tokens
        self._prefilled(state, now)
