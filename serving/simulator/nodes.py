"""Simulated nodes: the prefill side, the decode side, and coupled nodes that are both."""

import bisect
import dataclasses
from collections.abc import Callable

from serving.simulator.batch import IteratingBatch, Timer
from serving.simulator.cache import NodeCache
from serving.simulator.performance import Performance
from serving.simulator.request_state import RequestState


@dataclasses.dataclass(slots=True)
class Nic:
    """A full-duplex NIC: transfers in each direction follow one another, at full bandwidth.

    `count` of them, in a group of nodes, share each transfer.
    """

    count: int = 1
    send_free_s: float = 0.0
    receive_free_s: float = 0.0


def transfer(sender: Nic, receiver: Nic, seconds: float, now: float) -> float:
    """Books a transfer on both NICs as soon as both are free; returns its end. `seconds` is for one NIC."""
    start_s = max(now, sender.send_free_s, receiver.receive_free_s)
    sender.send_free_s = start_s + seconds / sender.count
    receiver.receive_free_s = start_s + seconds / receiver.count
    return max(sender.send_free_s, receiver.receive_free_s)


class PrefillNode:
    """One prefill at a time, from a queue ordered by the Conductor. A `PrefillInstance`."""

    def __init__(
        self,
        name: str,
        index: int,
        performance: Performance,
        nics: list[Nic],
        cache: NodeCache,
        at: Timer,
        done: Callable[[RequestState, float], None],
        layer_wise: bool = True,
    ) -> None:
        self.name, self.index, self.cache = name, index, cache
        self.busy_s = 0.0
        self.running: RequestState | None = None
        self._performance, self._nics = performance, nics
        self._at, self._done, self._layer_wise = at, done, layer_wise
        self._queue: list[tuple[float, int, RequestState]] = []
        self._queued_s = 0.0
        self._busy_until_s = 0.0
        self._epoch = 0

    def queue_s(self, now: float, queue_key: float) -> float:
        running_s = self._busy_until_s - now if self._busy_until_s > now else 0.0
        queue = self._queue
        if not queue or queue_key >= queue[-1][0]:
            return running_s + self._queued_s
        ahead = bisect.bisect_right(queue, queue_key, key=lambda entry: entry[0])
        return running_s + sum(self._work_s(state) for _, _, state in queue[:ahead])

    def fetch_wait_s(self, now: float, source: int) -> float:
        return max(0.0, self._nics[source].send_free_s - now, self._nics[self.index].receive_free_s - now)

    @property
    def free_at_s(self) -> float:
        """When the queue would be empty, as predicted."""
        return self._busy_until_s + self._queued_s

    @property
    def queued(self) -> int:
        return len(self._queue)

    def enqueue(self, state: RequestState, now: float) -> None:
        self._queued_s += self._work_s(state)
        bisect.insort(self._queue, (state.placement.queue_key, state.number, state))
        if self.running is None:
            self._start(now)

    def fail(self, now: float) -> list[RequestState]:
        """Drops everything; returns what was here."""
        lost = [state for _, _, state in self._queue]
        self._queue.clear()
        self._queued_s = 0.0
        if self.running is not None:
            lost.append(self.running)
            self._abort(self.running, now)
        return lost

    def withdraw(self, state: RequestState, now: float) -> None:
        """Gives up a request that waits or runs here."""
        if state is self.running:
            self._abort(state, now)
            if self._queue:
                self._start(now)
            return
        self._queue = [entry for entry in self._queue if entry[2] is not state]
        self._queued_s -= self._work_s(state)

    def _abort(self, state: RequestState, now: float) -> None:
        """Stops the running prefill; its device time is what was spent until now."""
        self.running = None
        self._spend(state, now)
        self._busy_until_s = now
        self._epoch += 1

    @staticmethod
    def _spend(state: RequestState, now: float) -> None:
        state.compute_s *= (now - state.started_s) / state.prefill_s

    def _work_s(self, state: RequestState) -> float:
        """How long it keeps the next one from starting, as predicted."""
        return state.placement.predicted_prefill_s

    def _next(self) -> RequestState:
        """Takes the first one from the queue."""
        state = self._queue.pop(0)[2]
        self._queued_s = self._queued_s - self._work_s(state) if self._queue else 0.0
        return state

    def _waits_s(self, state: RequestState, now: float, nodes: int = 1) -> float:
        """For KV to be fetched and loaded, and without layers also to be stored."""
        performance, placement = self._performance, state.placement
        load_s = performance.load_token * placement.reused_tokens
        if (slow := state.ssd_tokens) > 0:
            load_s += performance.ssd_token * slow
        fetch_s = max(0.0, state.fetched_s - now)
        if self._layer_wise:
            # Layer by layer, they also hide behind each other.
            return max(load_s / nodes, fetch_s)
        store_s = performance.load_token * (state.request.input_tokens - placement.reused_tokens)
        return fetch_s + (load_s + store_s) / nodes

    def _start(self, now: float) -> None:
        state = self._next()
        compute_s = self._performance.costs.prefill_s(state.request.input_tokens, state.placement.reused_tokens)
        waits_s = self._waits_s(state, now)
        # Layer by layer, loading and fetching hide behind computing (or the other way round).
        state.prefill_s = max(compute_s, waits_s) if self._layer_wise else waits_s + compute_s
        state.compute_s, state.started_s = compute_s, now
        self.running = state
        self.busy_s += state.prefill_s
        self._busy_until_s = now + state.prefill_s
        self._at(self._busy_until_s, self._finish, self._epoch)

    def _finish(self, epoch: int, now: float) -> None:
        if epoch != self._epoch or self.running is None:
            return
        state, self.running = self.running, None
        if self._queue:
            self._start(now)
        self._done(state, now)


class DecodeNode(IteratingBatch):
    """A decode instance: what was promised to it, and its running batch. A `DecodeInstance`."""

    def __init__(
        self,
        name: str,
        index: int,
        performance: Performance,
        max_batch: int,
        at: Timer,
        finished: Callable[[RequestState, float], None],
    ) -> None:
        super().__init__(performance.decode_times, performance.kv_capacity_tokens, max_batch, at, finished)
        self.name, self.index = name, index
        self.kv_capacity_tokens = performance.kv_capacity_tokens
        self.assigned = 0
        self.assigned_tokens = 0

    @property
    def present(self) -> int:
        return len(self._members) + len(self.waiting)

    @property
    def present_tokens(self) -> int:
        return self.tokens + sum(state.request.input_tokens for state in self.waiting)

    def assign(self, state: RequestState, sign: int) -> float:
        """Counts a promise (+1) or its end (-1); returns the load that orders decode instances: predicted TBT, s."""
        self.assigned += sign
        self.assigned_tokens += sign * state.request.input_tokens
        return self.times.decode_s(self.assigned, self.assigned_tokens)


class CoupledNode(DecodeNode):
    """Prefill and decode on one node: prefill stalls the batch (`chunk` = 0) or shares its iterations, chunk by chunk.

    Without chunks, waiting prompts are computed one after the other at the next iteration's end, before decoding goes
    on (vLLM's prefill-first scheduling). With them, every iteration also computes up to `chunk` tokens of the first
    waiting prompt.
    """

    def __init__(
        self,
        name: str,
        index: int,
        performance: Performance,
        max_batch: int,
        at: Timer,
        finished: Callable[[RequestState, float], None],
        cache: NodeCache,
        prefilled: Callable[[RequestState, float], None],
        chunk: int = 0,
    ) -> None:
        super().__init__(name, index, performance, max_batch, at, finished)
        self.cache, self.costs = cache, performance.costs
        self.busy_s = 0.0
        self._chunk, self._prefilled = chunk, prefilled
        self._prompts: list[RequestState] = []
        self._prompts_s = 0.0
        self._computed = 0
        self._stalled = False
        self._piece = 0

    @property
    def queued(self) -> int:
        return len(self._prompts)

    def queue_s(self, now: float, queue_key: float) -> float:
        """Work of the prompts ahead of `queue_key`."""
        prompts = self._prompts
        if not prompts or queue_key >= prompts[-1].placement.queue_key:
            return self._prompts_s
        return sum(state.placement.predicted_prefill_s for state in prompts[: self._place(queue_key)])

    def fetch_wait_s(self, now: float, source: int) -> float:
        """Coupled nodes never fetch."""
        return float("inf")

    def enqueue(self, state: RequestState, now: float) -> None:
        self._prompts.insert(self._place(state.placement.queue_key), state)
        self._prompts_s += state.placement.predicted_prefill_s
        if len(self._prompts) == 1 and not self._stalled:
            self._interrupt(now)

    def _place(self, queue_key: float) -> int:
        """Of a prompt among those that wait; the one that is being computed stays first."""
        begun = int(bool(self._prompts) and bool(self._stalled or self._computed or self._piece))
        return bisect.bisect_right(self._prompts, queue_key, begun, key=lambda state: state.placement.queue_key)

    def join(self, state: RequestState, now: float) -> None:
        """Its own prompts join at the end of their prefill, where the batch changes anyway."""
        del now
        self.waiting.append(state)

    def fail(self, now: float) -> list[RequestState]:
        if self._prompts:
            self._abort(self._prompts[0], now)
        lost = [*super().fail(now), *self._prompts]
        self._prompts.clear()
        self._prompts_s, self._computed, self._piece, self._stalled = 0.0, 0, 0, False
        return lost

    def _abort(self, state: RequestState, now: float) -> None:
        """Stops the first prompt; its device time is what was spent until now, of chunks those that are done."""
        if self._stalled:
            state.compute_s *= (now - state.started_s) / state.prefill_s
        elif self._computed:
            reused = state.placement.reused_tokens
            state.compute_s = self.costs.prefill_s(reused + self._computed, reused)

    def _change(self, now: float) -> None:
        if self._prompts and not self._chunk:
            self._stalled = True
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
            self.busy_s += state.compute_s
            self._finish_prompt(now)

    def _compute(self, now: float) -> None:
        state = self._prompts[0]
        state.started_s = now
        state.compute_s = state.prefill_s = self.costs.prefill_s(
            state.request.input_tokens, state.placement.reused_tokens
        )
        self.busy_s += state.compute_s
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
        self._prompts_s = self._prompts_s - state.placement.predicted_prefill_s if self._prompts else 0.0
        self._computed = 0
        self._prefilled(state, now)
