"""A simulated prefill node."""

import bisect
from collections.abc import Callable

from serving.cluster.instance import Events
from serving.simulator.clock import Timer
from serving.simulator.performance import Performance
from serving.simulator.simulated_request import SimulatedRequest

Prefilled = Callable[[SimulatedRequest, float], None]


class PrefillNode:
    """One prefill at a time, from a queue in the order of the Conductor's queue keys."""

    def __init__(
        self,
        *,
        index: int,
        performance: Performance,
        at: Timer,
        events: Events,
        prefilled: Prefilled,
        layer_wise: bool = True,
    ) -> None:
        """`index` is that of the instance in the prefill pool; `prefilled` is called at the end of each prefill."""
        self.index = index
        self.running: SimulatedRequest | None = None
        self._performance, self._layer_wise = performance, layer_wise
        self._at, self._events, self._prefilled = at, events, prefilled
        self._queue: list[tuple[float, int, SimulatedRequest]] = []
        # Counts aborts, so that the end of a prefill that was aborted is recognised.
        self._version = 0

    def enqueue(self, state: SimulatedRequest, now: float) -> None:
        bisect.insort(self._queue, (state.placement.queue_key, state.number, state))
        if self.running is None:
            self._start(now)

    def fail(self, now: float) -> None:
        """Drops everything, after a report of the device time that was spent."""
        self._queue.clear()
        if self.running is not None:
            self._abort(self.running, now)

    def withdraw(self, request_id: str, now: float) -> None:
        """Gives up a request that waits or runs here, if it does."""
        if self.running is not None and self.running.request.id == request_id:
            self._abort(self.running, now)
            if self._queue:
                self._start(now)
            return
        self._queue = [entry for entry in self._queue if entry[2].request.id != request_id]

    def _abort(self, state: SimulatedRequest, now: float) -> None:
        """Stops the running prefill; its device time is what was spent until now."""
        self.running = None
        self._spend(state, now)
        self._events.began(self.index, None, now)
        self._version += 1

    def _spend(self, state: SimulatedRequest, now: float) -> None:
        self._events.stopped(state.request.id, state.compute_s * ((now - state.started_s) / state.prefill_s))

    def _waits_s(self, state: SimulatedRequest, now: float, nodes: int = 1) -> float:
        """For KV to be fetched and loaded, and without layers also to be stored."""
        performance, placement = self._performance, state.placement
        load_s = performance.load_token * placement.reused_tokens
        if (slow := state.ssd_tokens) > 0:
            load_s += performance.ssd_token * slow
        fetch_s = max(0.0, state.fetched_s - now) if state.fetched_s is not None else 0.0
        if self._layer_wise:
            # Layer by layer, they also hide behind each other.
            return max(load_s / nodes, fetch_s)
        store_s = performance.load_token * (state.request.input_tokens - placement.reused_tokens)
        return fetch_s + (load_s + store_s) / nodes

    def _start(self, now: float) -> None:
        state = self._queue.pop(0)[2]
        compute_s = self._performance.costs.prefill_s(state.request.input_tokens, state.placement.reused_tokens)
        waits_s = self._waits_s(state, now)
        # Layer by layer, loading and fetching hide behind computing (or the other way round).
        state.prefill_s = max(compute_s, waits_s) if self._layer_wise else waits_s + compute_s
        state.compute_s, state.started_s = compute_s, now
        self.running = state
        end_s = now + state.prefill_s
        self._events.began(self.index, state.request.id, end_s)
        self._at(end_s, self._finish, self._version)

    def _finish(self, version: int, now: float) -> None:
        if version != self._version or self.running is None:
            return
        state, self.running = self.running, None
        if self._queue:
            self._start(now)
        self._prefilled(state, now)
