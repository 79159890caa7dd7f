"""A group of prefill nodes that compute prompts as a pipeline of chunks."""

from collections import deque
from collections.abc import Callable

from serving.conductor.pipeline import PipelineTimeModel
from serving.simulator.batch import Timer
from serving.simulator.cache import NodeCache
from serving.simulator.nodes import Nic, PrefillNode
from serving.simulator.performance import Performance
from serving.simulator.request_state import RequestState


class PrefillGroup(PrefillNode):
    """Prompts one behind the other in the pipeline. `performance` is that of one node, `costs` of the group.

    `running` is the prompt on the first stage; those behind it are further on.
    """

    def __init__(
        self,
        name: str,
        index: int,
        performance: Performance,
        nics: list[Nic],
        cache: NodeCache,
        at: Timer,
        done: Callable[[RequestState, float], None],
        layer_wise: bool,
        costs: PipelineTimeModel,
    ) -> None:
        super().__init__(name, index, performance, nics, cache, at, done, layer_wise)
        self._costs = costs
        self._free_s = [0.0] * costs.stages
        # `None` stands for a prompt that was given up on its way.
        self._inside: deque[RequestState | None] = deque()

    def fail(self, now: float) -> list[RequestState]:
        inside = [state for state in self._inside if state is not None and state is not self.running]
        for state in inside:
            self._spend(state, now)
        lost = [*inside, *super().fail(now)]
        self._inside.clear()
        self._epoch += 1
        self._free_s = [now] * self._costs.stages
        return lost

    def withdraw(self, state: RequestState, now: float) -> None:
        """Gives up a request that waits here; one that is in the pipeline already keeps its stages busy."""
        if state in self._inside:
            self._inside[self._inside.index(state)] = None
        else:
            super().withdraw(state, now)

    def _work_s(self, state: RequestState) -> float:
        return self._costs.occupied_s(state.request.input_tokens, state.placement.reused_tokens)

    def _start(self, now: float) -> None:
        state = self._next()
        tokens, reused, costs = state.request.input_tokens, state.placement.reused_tokens, self._costs
        waits_s = self._waits_s(state, now, costs.stages)
        if self._layer_wise:
            waits_s = max(0.0, waits_s - costs.prefill_s(tokens, reused))
        free_s = self._free_s
        for hop_s, seconds in costs.chunks(tokens, reused):
            ready_s = now + waits_s
            for stage, stage_free_s in enumerate(free_s):
                ready_s = max(ready_s + hop_s if stage else ready_s, stage_free_s) + seconds
                free_s[stage] = ready_s
        state.started_s, state.prefill_s = now, free_s[-1] - now
        state.compute_s = costs.occupied_s(tokens, reused) * costs.stages
        self.running = state
        self._inside.append(state)
        self._busy_until_s = free_s[0]
        self._at(free_s[0], self._passed_first, self._epoch)
        self._at(free_s[-1], self._finish, self._epoch)

    def _passed_first(self, epoch: int, now: float) -> None:
        if epoch == self._epoch:
            self.running = None
            if self._queue:
                self._start(now)

    def _finish(self, epoch: int, now: float) -> None:
        if epoch == self._epoch:
            state = self._inside.popleft()
            if state is not None:
                self._done(state, now)
