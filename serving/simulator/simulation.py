"""A trace played through a simulated cluster: the clock, the trace, and what became of each request."""

import dataclasses
import heapq
import itertools
from collections.abc import Callable
from typing import Any

from serving.cluster.coordinator import Coordinator
from serving.cluster.request_state import Phase, RequestState
from serving.conductor import Conductor, PrefillReport
from serving.request import Request, TraceRequest
from serving.simulator.cluster import Cluster, cluster_mirror, prefill_costs, runs_engines
from serving.simulator.config import ClusterConfig
from serving.simulator.performance import Performance
from serving.simulator.recorder import Recorder
from serving.simulator.result import SimulationResult
from serving.workload.outcomes import COMPLETED, REJECTED, RequestOutcome
from serving.workload.requests import Trace


def remainder(request: Request, tokens: int, block_size: int, now: float) -> Request:
    """What is left of a request: the generated tokens are prompt now, behind the blocks that were full."""
    assert isinstance(request, TraceRequest)
    return dataclasses.replace(
        request,
        arrival_s=now,
        input_tokens=request.input_tokens + tokens,
        output_tokens=request.output_tokens - tokens,
        keys=request.keys[: request.input_tokens // block_size],
    )


class Simulation:
    """One run of a trace through a cluster, scheduled by the Conductor that would schedule the live one.

    A `Listener` of its Coordinator.
    """

    def __init__(self, config: ClusterConfig, performance: Performance, recorder: Recorder | None = None) -> None:
        self._config, self._performance, self._recorder = config, performance, recorder
        self._timers: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._numbers = itertools.count()
        self._outcomes: dict[str, RequestOutcome] = {}
        self._prefill_s = self._wasted_s = 0.0
        self._too_long = self._reruns = 0
        self._arriving = True
        self._engines = runs_engines(config, performance)
        tiers = ("device",) if self._engines else ("host", "ssd", "remote", "store")
        self.hits_by_tier = dict.fromkeys(tiers, 0)
        self.mirror = cluster_mirror(config, performance)
        costs = prefill_costs(config, performance) or performance.costs
        self.conductor = Conductor(config.conductor, self.mirror, costs)
        self.coordinator = Coordinator(self.conductor, self, remainder)
        self.cluster = Cluster(config, performance, self.at, self.coordinator)

    def at(self, time: float, handler: Callable[[Any, float], None], argument: Any) -> None:
        """Calls `handler(argument, time)` when the clock gets there."""
        heapq.heappush(self._timers, (time, next(self._numbers), handler, argument))

    def run(self, trace: Trace, progress: Callable[[int], object] | None = None) -> SimulationResult:
        """Plays a trace to its end. `progress` is told how many requests have arrived, now and then."""
        self.mirror.block_size = self.cluster.world.block_size = trace.block_size
        for seconds, number in self._config.failures:
            self.at(seconds, self.cluster.fail, number)
        for seconds, number in self._config.joins:
            self.at(seconds, self.cluster.join, number)
        if (roles := self._config.conductor.roles) is not None:
            self.at(trace.requests[0].arrival_s + roles.interval_s, self._rebalance, roles.interval_s)
        timers, pop, recorder = self._timers, heapq.heappop, self._recorder
        handled = 0
        for count, request in enumerate(trace.requests):
            arrival_s = request.arrival_s + self._performance.schedule_s
            while timers and timers[0][0] <= arrival_s:
                time, _, handler, argument = pop(timers)
                handler(argument, time)
                handled += 1
            if recorder is not None and arrival_s >= recorder.next_sample_s:
                recorder.sample(self.conductor, arrival_s)
            self.arrive(request, arrival_s)
            if progress is not None and count % 4096 == 0:
                progress(count)
        self._arriving = False
        time = trace.requests[-1].arrival_s
        while timers:
            time, _, handler, argument = pop(timers)
            handler(argument, time)
            handled += 1
            if recorder is not None and time >= recorder.next_sample_s:
                recorder.sample(self.conductor, time)
        self.coordinator.drain(time)
        outcomes = [self._outcomes[request.id] for request in trace.requests]
        end_s = max(outcome.finished_s for outcome in outcomes)
        return SimulationResult(
            outcomes=outcomes,
            prefill_s=self._prefill_s,
            wasted_prefill_s=self._wasted_s,
            hits_by_tier=self.hits_by_tier,
            rejections=self.conductor.rejections | ({"request too long": self._too_long} if self._too_long else {}),
            errors=self.conductor.errors(),
            events=handled + len(trace.requests),
            switches=self.coordinator.changes.count,
            reruns=self._reruns,
            node_hours=self.cluster.node_s(trace.requests[0].arrival_s, end_s) / 3600,
        )

    def arrive(self, request: TraceRequest, now: float) -> None:
        """A request comes to the cluster."""
        if self.cluster.fits(request):
            self.coordinator.arrive(request, now)
            return
        self._too_long += 1
        self.ended(RequestState(number=-1, arrived=request, request=request), REJECTED, now)

    def prefilled(self, state: RequestState, report: PrefillReport, now: float) -> None:
        assert state.task is not None
        self._prefill_s += report.compute_s
        if state.resumed is None:
            self._count_hits(state, report)
        if self._recorder is not None:
            node = self.mirror.prefill[state.task.placement.prefill].name
            self._recorder.prefilled(state, node, now)

    def _count_hits(self, state: RequestState, report: PrefillReport) -> None:
        assert state.task is not None
        placement, hits = state.task.placement, self.hits_by_tier
        if self._engines:
            hits["device"] += report.reused_tokens
            return
        hits["ssd"] += report.slow_tokens
        hits["host"] += placement.reused_tokens - placement.fetched_tokens - report.slow_tokens
        stored = placement.source is not None and placement.source == self.mirror.store
        hits["store" if stored else "remote"] += placement.fetched_tokens

    def rerun(self, state: RequestState, now: float) -> None:
        del now
        self._reruns += 1
        self._wasted_s += state.compute_s
        if state.first_token_s is None:
            self._prefill_s += state.compute_s

    def ended(self, state: RequestState, outcome: str, now: float) -> None:
        request, resumed, mirror = state.arrived, state.resumed, self.mirror
        assert isinstance(request, TraceRequest)
        placement = state.task.placement if state.task is not None else None
        first_token_s, hit_tokens = state.first_token_s, state.hit_tokens
        prefill = placement.prefill if placement is not None else None
        if resumed is not None:
            first_token_s, prefill, hit_tokens = resumed.first_token_s, resumed.prefill, resumed.hit_tokens
        if placement is not None and outcome != COMPLETED:
            self._wasted_s += state.compute_s
        if self._recorder is not None and placement is not None and state.phase is Phase.DECODE:
            self._recorder.decoded(state, mirror.decode[placement.decode].name, now)
        self._outcomes[request.id] = RequestOutcome(
            id=request.id,
            arrival_s=request.arrival_s,
            input_tokens=request.input_tokens,
            output_tokens=request.output_tokens if outcome == COMPLETED else state.tokens,
            ttft_s=None if first_token_s is None else first_token_s - request.arrival_s,
            tbt_s=state.tbt_s,
            hit_tokens=hit_tokens,
            prefill="" if prefill is None else mirror.prefill[prefill].name,
            decode="" if placement is None else mirror.decode[placement.decode].name,
            outcome=outcome,
            finished_s=now,
        )
        self.cluster.world.requests.pop(request.id, None)

    def _rebalance(self, interval_s: float, now: float) -> None:
        """Asks the Conductor, now and then, whether an instance is to change its role."""
        self.coordinator.rebalance(now)
        if self._arriving or self.coordinator.busy:
            self.at(now + interval_s, self._rebalance, interval_s)
