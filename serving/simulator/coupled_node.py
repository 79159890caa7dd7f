"""A simulated node that computes prompts and decodes them."""

import bisect

from serving.cluster.instance import Events
from serving.simulator.clock import Timer
from serving.simulator.decode_node import DecodeNode
from serving.simulator.performance import Performance
from serving.simulator.prefill_node import Prefilled
from serving.simulator.simulated_request import SimulatedRequest


class CoupledNode(DecodeNode):
    """Prefill and decode on one node: prefill stalls the batch (`chunk` = 0) or shares its iterations, chunk by chunk.

    Without chunks, waiting prompts are computed one after the other at the next iteration's end, before decoding goes
    on (vLLM's prefill-first scheduling). With them, every iteration also computes up to `chunk` tokens of the first
    waiting prompt.
    """

    def __init__(
        self,
        *,
        index: int,
        performance: Performance,
        max_batch: int,
        at: Timer,
        events: Events,
        prefilled: Prefilled,
        chunk: int = 0,
    ) -> None:
        super().__init__(
            index=index,
            times=performance.decode_times,
            capacity_tokens=performance.kv_capacity_tokens,
            max_batch=max_batch,
            at=at,
            events=events,
        )
        self.costs = performance.costs
        self._chunk, self._prefilled = chunk, prefilled
        self._prompts: list[SimulatedRequest] = []
        self._computed = 0
        self._stalled = False
        self._piece = 0

    def enqueue(self, state: SimulatedRequest, now: float) -> None:
        self._prompts.insert(self._place(state.placement.queue_key), state)
        if len(self._prompts) == 1 and not self._stalled:
            self._interrupt(now)

    def _place(self, queue_key: float) -> int:
        """Of a prompt among those that wait; the one that is being computed stays first."""
        begun = int(bool(self._prompts) and bool(self._stalled or self._computed or self._piece))
        return bisect.bisect_right(self._prompts, queue_key, begun, key=lambda state: state.placement.queue_key)

    def join(self, state: SimulatedRequest, now: float) -> None:
        """Its own prompts join at the end of their prefill, where the batch changes anyway."""
        del now
        self.waiting.append(state)
        self._loaded()

    def fail(self, now: float) -> None:
        if self._prompts:
            self._abort(self._prompts[0], now)
        super().fail(now)
        self._prompts.clear()
        self._computed, self._piece, self._stalled = 0, 0, False

    def _abort(self, state: SimulatedRequest, now: float) -> None:
        """Stops the first prompt; its device time is what was spent until now, of chunks those that are done."""
        if self._stalled:
            self._events.stopped(state.request.id, state.compute_s * ((now - state.started_s) / state.prefill_s))
        elif self._computed:
            reused = state.placement.reused_tokens
            self._events.stopped(state.request.id, self.costs.prefill_s(reused + self._computed, reused))

    def _change(self, now: float) -> None:
        if self._prompts and not self._chunk:
            self._stalled = True
            self._loaded()
            self._compute(now)
        else:
            super()._change(now)

    def _iteration(self, size: int) -> tuple[float, float, int]:
        first, increment, most = super()._iteration(size)
        self._piece = 0
        if not (self._prompts and self._chunk):
            return first, increment, most
        state, costs = self._prompts[0], self.costs
        reused = state.placement.reused_tokens
        begin = reused + self._computed
        left = state.request.input_tokens - begin
        self._piece = piece = min(self._chunk, left)
        first += costs.prefill_token * piece + costs.prefill_pair * piece * (2 * begin + piece)
        if not self._computed:
            state.started_s = self._start_s
            self._events.began(self.index, state.request.id, self._start_s)
            return first + costs.prefill_base + costs.prefill_reused * reused, increment, 1
        # Each chunk attends to one more chunk than the one before it.
        chunks = max(1, left // self._chunk)
        return first, increment + 2 * costs.prefill_pair * piece * piece, min(chunks, most) if size else chunks

    def _advance_prefill(self, iterations: int, now: float) -> None:
        if not self._piece:
            return
        self._computed += self._piece * iterations
        state = self._prompts[0]
        reused, tokens = state.placement.reused_tokens, state.request.input_tokens
        if reused + self._computed == tokens:
            state.compute_s = state.prefill_s = self.costs.prefill_s(tokens, reused)
            self._finish_prompt(now)

    def _compute(self, now: float) -> None:
        state = self._prompts[0]
        state.started_s = now
        self._events.began(self.index, state.request.id, now)
        state.compute_s = state.prefill_s = self.costs.prefill_s(
            state.request.input_tokens, state.placement.reused_tokens
        )
        self._planned = 0
        self._version += 1
        self._at(now + state.compute_s, self._computed_whole, self._version)

    def _computed_whole(self, version: int, now: float) -> None:
        if version != self._version:
            return
        self._finish_prompt(now)
        if self._prompts:
            self._compute(now)
        else:
            self._stalled = False
            super()._change(now)

    def _finish_prompt(self, now: float) -> None:
        state = self._prompts.pop(0)
        self._computed = 0
        self._loaded()
        if self._prompts:
            self._events.began(self.index, self._prompts[0].request.id, now)
        self._prefilled(state, now)
