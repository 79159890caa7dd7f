"""A batch that iterates: continuous batching, advanced in closed form between changes of its members.

With b sequences and c tokens of KV an iteration takes base + b * sequence + c * token, and c grows by b with each, so
the iterations between two changes are an arithmetic progression: their sum, the number that fit into a time, and the
gaps that each member saw follow without visiting them. Where times come from a table, a progression ends at its knots.
"""

import heapq
from collections import deque
from typing import Protocol

from serving.cluster.gaps import Progression, iterations_within, progression_sum
from serving.cluster.instance import Events
from serving.simulator.clock import Timer
from serving.simulator.simulated_request import SimulatedRequest

_TRIM = 4096


class DecodeTimes(Protocol):
    """Seconds of decode iterations: a `TimeModel` or a `DecodeTable`."""

    def decode_s(self, batch: float, tokens: float) -> float: ...

    def decode_run(self, batch: int, tokens: int) -> tuple[float, float, int]: ...


class DecodeNode:
    """The running batch of one decode (or coupled) instance.

    Attributes:
        waiting: requests whose KV is here, in order of arrival.
        tokens: KV tokens of the running batch.
    """

    def __init__(
        self,
        *,
        index: int,
        times: DecodeTimes,
        capacity_tokens: int,
        max_batch: int,
        at: Timer,
        events: Events,
        reports_iterations: bool = False,
    ) -> None:
        """`index` is that of the instance in the decode pool; `reports_iterations` where somebody learns from them."""
        self.index = index
        self.times = times
        self.capacity_tokens = capacity_tokens
        self.max_batch = max_batch
        self.waiting: deque[SimulatedRequest] = deque()
        self.tokens = 0
        self.iterations = 0
        self._at = at
        self._events, self._reports_iterations = events, reports_iterations
        self._reserved = 0
        self._members: list[tuple[int, int, SimulatedRequest]] = []
        self._start_s = 0.0
        self._last_token_s = 0.0
        self._first, self._increment, self._planned = 0.0, 0.0, 0
        self._version = 0
        self._log: list[Progression] = []
        self._log_base = 0

    @property
    def size(self) -> int:
        return len(self._members)

    def join(self, state: SimulatedRequest, now: float) -> None:
        """Takes a request whose KV is here; it joins when the current iteration ends."""
        self.waiting.append(state)
        self._loaded()
        self._interrupt(now)

    def fail(self, now: float) -> None:
        """Drops everything, after a report of the tokens that came until now."""
        if self._planned:
            # A token that would come this very moment is lost.
            done = min(iterations_within(self._first, self._increment, now - self._start_s), self._planned - 1)
            self._log_run(done, self._start_s + progression_sum(self._first, self._increment, done))
        for _, _, state in self._members:
            if gaps := self._gaps(state):
                self._events.tokens(state.request.id, gaps, self._last_token_s)
        self._members.clear()
        self.waiting.clear()
        self._version += 1
        self.tokens = self._reserved = self._planned = 0

    def _loaded(self) -> None:
        waiting = sum(state.request.input_tokens for state in self.waiting) if self.waiting else 0
        self._events.loaded(self.index, self.tokens + waiting)

    def _interrupt(self, now: float) -> None:
        """Ends the current run of iterations at the next iteration's end."""
        if not self._planned:
            self._change(now)
            return
        done = iterations_within(self._first, self._increment, now - self._start_s) + 1
        if done < self._planned:
            self._plan(done)

    def _plan(self, iterations: int) -> None:
        self._planned = iterations
        self._version += 1
        if not iterations:
            return
        end_s = self._start_s + progression_sum(self._first, self._increment, iterations)
        self._at(end_s, self._ended, self._version)

    def _ended(self, version: int, now: float) -> None:
        if version != self._version:
            return
        count = self._planned
        self._log_run(count, now)
        if self._reports_iterations:
            size, mean = len(self._members), (count - 1) / 2
            self._events.observe_iterations(size, self.tokens + size * mean, self._first + self._increment * mean)
        self.iterations += count
        self.tokens += count * len(self._members)
        self._advance_prefill(count, now)
        while self._members and self._members[0][0] == self.iterations:
            state = heapq.heappop(self._members)[2]
            held = state.request.input_tokens + state.request.output_tokens
            self.tokens -= held
            self._reserved -= held
            self._loaded()
            self._events.finished(state.request.id, state.attempt, self._gaps(state), now)
        self._change(now)

    def _log_run(self, count: int, end_s: float) -> None:
        """Notes the gaps of the `count` iterations that ended at `end_s`."""
        if not count:
            return
        first, increment = self._first, self._increment
        stall_s = self._start_s - self._last_token_s
        if stall_s > 0:
            self._log.append((first + stall_s, 0.0, 1))
            if count > 1:
                self._log.append((first + increment, increment, count - 1))
        else:
            self._log.append((first, increment, count))
        self._last_token_s = end_s

    def _change(self, now: float) -> None:
        """Admits whoever fits and starts the next run of iterations."""
        joined = self._admit(now)
        self._loaded()
        size = len(self._members)
        if not size:
            self._log.clear()
            self._log_base = 0
        elif len(self._log) > _TRIM:
            self._trim()
        self._start_s = now
        self._first, self._increment, most = self._iteration(size)
        for state in joined:
            assert state.first_token_s is not None
            state.first_gap_s = now - state.first_token_s + self._first
        self._plan(min(most, self._members[0][0] - self.iterations) if size else most)

    def _iteration(self, size: int) -> tuple[float, float, int]:
        """First term and increment of the iteration times from now on, and how many follow that rule (0 = idle)."""
        return self.times.decode_run(size, self.tokens) if size else (0.0, 0.0, 0)

    def _admit(self, now: float) -> list[SimulatedRequest]:
        """Requests join in order of arrival once the KV that they will ever need fits."""
        joined: list[SimulatedRequest] = []
        while self.waiting and len(self._members) < self.max_batch:
            request = self.waiting[0].request
            needed = request.input_tokens + request.output_tokens
            if self._reserved + needed > self.capacity_tokens and self._members:
                break
            state = self.waiting.popleft()
            self._reserved += needed
            self.tokens += request.input_tokens + 1
            heapq.heappush(self._members, (self.iterations + request.output_tokens - 1, state.number, state))
            state.log_start = self._log_base + len(self._log)
            joined.append(state)
        if len(joined) == len(self._members):
            # Nobody waited through what came before, so nobody saw it as a gap.
            self._last_token_s = now
        return joined

    def _advance_prefill(self, iterations: int, now: float) -> None:
        """Where iterations also compute prompts, those that this many iterations computed."""
        del iterations, now

    def _gaps(self, state: SimulatedRequest) -> list[Progression]:
        """Gaps that a member saw; the first reaches back to its first token."""
        log = self._log[state.log_start - self._log_base :]
        if log:
            first, increment, count = log[0]
            log[0] = (first + increment, increment, count - 1)
            log.append((state.first_gap_s, 0.0, 1))
        return log

    def _trim(self) -> None:
        """Forgets iterations that no running request saw."""
        oldest = min(state.log_start for _, _, state in self._members)
        del self._log[: oldest - self._log_base]
        self._log_base = oldest
