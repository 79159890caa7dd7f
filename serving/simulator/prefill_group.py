"""A group of prefill nodes that compute prompts as a pipeline of chunks."""

from collections import deque

from serving.cluster.instance import Events
from serving.conductor.pipeline import PipelineTimeModel
from serving.simulator.clock import Timer
from serving.simulator.performance import Performance
from serving.simulator.prefill_node import Prefilled, PrefillNode
from serving.simulator.simulated_request import SimulatedRequest


class PrefillGroup(PrefillNode):
    """Prompts one behind the other in the pipeline. `performance` is that of one node, `costs` of the group.

    `running` is the prompt on the first stage; those behind it are further on.
    """

    def __init__(
        self,
        *,
        index: int,
        performance: Performance,
        at: Timer,
        events: Events,
        prefilled: Prefilled,
        layer_wise: bool,
        costs: PipelineTimeModel,
    ) -> None:
        super().__init__(
            index=index, performance=performance, at=at, events=events, prefilled=prefilled, layer_wise=layer_wise
        )
        self._costs = costs
        self._free_s = [0.0] * costs.stages
        # `None` stands for a prompt that was given up on its way.
        self._inside: deque[SimulatedRequest | None] = deque()

    def fail(self, now: float) -> None:
        for state in self._inside:
            if state is not None and state is not self.running:
                self._spend(state, now)
        super().fail(now)
        self._inside.clear()
        self._version += 1
        self._free_s = [now] * self._costs.stages

    def withdraw(self, request_id: str, now: float) -> None:
        """Gives up a request that waits here; one that is in the pipeline already keeps its stages busy."""
        for place, state in enumerate(self._inside):
            if state is not None and state.request.id == request_id:
                self._inside[place] = None
                self._events.stopped(request_id, state.compute_s)
                return
        super().withdraw(request_id, now)

    def _start(self, now: float) -> None:
        state = self._queue.pop(0)[2]
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
        self._events.began(self.index, state.request.id, free_s[0])
        self._at(free_s[0], self._passed_first, self._version)
        self._at(free_s[-1], self._finish, self._version)

    def _passed_first(self, version: int, now: float) -> None:
        if version == self._version:
            self.running = None
            if self._queue:
                self._start(now)

    def _finish(self, version: int, now: float) -> None:
        if version == self._version:
            state = self._inside.popleft()
            if state is not None:
                self._prefilled(state, now)
