"""A trace played through a simulated cluster: the clock, and the life of each request."""

import heapq
import itertools
from collections.abc import Callable
from typing import Any

from serving.conductor import Conductor, Placement, PrefillReport, Rejection
from serving.request import TraceRequest
from serving.simulator.cluster import Cluster
from serving.simulator.config import ClusterConfig
from serving.simulator.failures import lost_requests
from serving.simulator.nodes import DecodeNode
from serving.simulator.performance import Performance
from serving.simulator.recorder import Recorder
from serving.simulator.request_state import RequestState, ResumedProgress
from serving.simulator.result import SimulationResult
from serving.simulator.role_changes import RoleChanges
from serving.workload.outcomes import COMPLETED, FAILED, REJECTED, RequestOutcome
from serving.workload.requests import Trace


class Simulation:
    """One run of a trace through a cluster, scheduled by the Conductor that would schedule the live one."""

    def __init__(self, config: ClusterConfig, performance: Performance, recorder: Recorder | None = None) -> None:
        self._config, self._performance, self._recorder = config, performance, recorder
        self._events: list[tuple[float, int, Callable[[Any, float], None], Any]] = []
        self._numbers = itertools.count()
        self._outcomes: dict[str, RequestOutcome] = {}
        # Requests that have not ended, as they were last scheduled, with their place in the order of arrival.
        self._open: dict[str, tuple[int, TraceRequest]] = {}
        self._states: dict[str, RequestState] = {}
        self._interrupted: dict[str, ResumedProgress] = {}
        self._prefill_s = self._wasted_s = 0.0
        self._too_long = self._reruns = 0
        self._arriving = True
        self.cluster = Cluster(config, performance, self.at, self._prefilled, self._decoded)
        self.hits_by_tier = dict.fromkeys(self.cluster.tiers, 0)
        self.conductor = Conductor(config.conductor, self.cluster.view, self.cluster.costs)
        self._changes = RoleChanges(self.cluster, self.conductor, self._states, self.at, self._release)
        if config.conductor.learn and not config.coupled:
            for node in self.cluster.decode:
                if isinstance(node, DecodeNode):
                    node.report = self.conductor.observe_iterations

    def at(self, time: float, handler: Callable[[Any, float], None], argument: Any) -> None:
        """Calls `handler(argument, time)` when the clock gets there."""
        heapq.heappush(self._events, (time, next(self._numbers), handler, argument))

    def run(self, trace: Trace, progress: Callable[[int], object] | None = None) -> SimulationResult:
        """Plays a trace to its end. `progress` is told how many requests have arrived, now and then."""
        self.cluster.view.block_size = trace.block_size
        for seconds, node in self._config.failures:
            self.at(seconds, self._fail, node)
        for seconds, node in self._config.joins:
            self.at(seconds, self._join, node)
        if (roles := self._config.conductor.roles) is not None:
            self.at(trace.requests[0].arrival_s + roles.interval_s, self._rebalance, 0)
        events, pop, recorder = self._events, heapq.heappop, self._recorder
        handled = 0
        for count, request in enumerate(trace.requests):
            arrival_s = request.arrival_s + self._performance.schedule_s
            while events and events[0][0] <= arrival_s:
                time, _, handler, argument = pop(events)
                handler(argument, time)
                handled += 1
            if recorder is not None and arrival_s >= recorder.next_sample_s:
                recorder.sample(self.cluster, self.conductor, arrival_s)
            self._arrive(request, arrival_s)
            if progress is not None and count % 4096 == 0:
                progress(count)
        self._arriving = False
        time = trace.requests[-1].arrival_s
        while events:
            time, _, handler, argument = pop(events)
            handler(argument, time)
            handled += 1
            if recorder is not None and time >= recorder.next_sample_s:
                recorder.sample(self.cluster, self.conductor, time)
        for request in self.conductor.drain():
            self._end(self._open[request.id][1], REJECTED, time)
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
            switches=self._changes.count,
            reruns=self._reruns,
            node_hours=self.cluster.node_s(trace.requests[0].arrival_s, end_s) / 3600,
        )

    def _arrive(self, request: TraceRequest, now: float) -> None:
        place = self._open[request.id][0] if request.id in self._open else len(self._open) + len(self._outcomes)
        self._open[request.id] = place, request
        if not self.cluster.fits(request):
            self._too_long += 1
            self._end(request, REJECTED, now)
            return
        decision = self.conductor.schedule(request, now)
        if isinstance(decision, Placement):
            self._launch(request, decision, now)
        elif isinstance(decision, Rejection):
            self._end(request, REJECTED, now)

    def _release(self, now: float) -> None:
        """Launches waiting requests one by one, so that each decision sees the one before it."""
        while self.conductor.deferred:
            decided = self.conductor.release(now)
            if decided is None:
                return
            request, decision = self._open[decided[0].id][1], decided[1]
            if isinstance(decision, Rejection):
                self._end(request, REJECTED, now)
            else:
                self._launch(request, decision, now)

    def _launch(self, request: TraceRequest, placement: Placement, now: float) -> None:
        """Books what the Conductor decided: KV to fetch, a place in the queue, a promise of decode."""
        cluster = self.cluster
        node = cluster.prefill[placement.prefill]
        resumed = self._interrupted.pop(request.id, None) if self._interrupted else None
        state = RequestState(
            number=self._open[request.id][0], request=request, placement=placement, resumed=resumed, placed_s=now
        )
        self._states[request.id] = state
        state.ssd_tokens = cluster.ssd_tokens(state)
        if placement.source is not None:
            state.fetched_s = cluster.fetch(state, placement.source, now)
        cluster.insert_blocks(node.index, request, now)
        cluster.reserve(state)
        node.enqueue(state, now)
        cluster.rank(node)

    def _count_hits(self, state: RequestState) -> None:
        placement, hits = state.placement, self.hits_by_tier
        if self.cluster.engines:
            # An engine finds out only now what its pages still hold.
            hits["device"] += placement.reused_tokens
            return
        hits["ssd"] += state.ssd_tokens
        hits["host"] += placement.reused_tokens - placement.fetched_tokens - state.ssd_tokens
        stored = placement.source is not None and placement.source >= len(self.cluster.caches)
        hits["store" if stored else "remote"] += placement.fetched_tokens

    def _prefilled(self, state: RequestState, now: float) -> None:
        request, placement, cluster = state.request, state.placement, self.cluster
        node = cluster.prefill[placement.prefill]
        cluster.rank(node)
        self._prefill_s += state.compute_s
        if (resumed := state.resumed) is None:
            self._count_hits(state)
        else:
            resumed.gaps.append((now - resumed.last_token_s, 0.0, 1))
            resumed.last_token_s = now
        state.first_token_s = now
        decodes = request.output_tokens > 1
        report = PrefillReport(
            queue_s=state.started_s - state.placed_s,
            fetch_s=state.fetched_s - state.placed_s if placement.source is not None else 0.0,
            execution_s=state.prefill_s,
            reused_tokens=placement.reused_tokens,
            decodes=decodes,
        )
        refused = self.conductor.prefill_done(request, report, now)
        if self._recorder is not None:
            self._recorder.prefilled(state, node.name, now)
        if not decodes or refused is not None:
            cluster.release(state)
            if refused is not None:
                self._wasted_s += state.compute_s
            elif resumed is not None:
                state.tbt_s = state.longest_gaps_s([])
            self._end(request, COMPLETED if refused is None else REJECTED, now, state)
        elif self._config.coupled:
            cluster.decode[placement.decode].join(state, now)
        else:
            self._send(state, state.started_s, now)
        if cluster.store is not None:
            # Behind what decode waits for.
            cluster.store.write(request, cluster.nics[node.index], cluster.view.directory, cluster.view.block_size, now)

    def _send(self, state: RequestState, since_s: float, now: float) -> None:
        """Sends all KV of a prompt to its decode node: from `since_s` on layer by layer, the last one after prefill."""
        state.arrives_s = self.cluster.hand_over(state, since_s, now)
        self.at(state.arrives_s, self._arrived, state.request.id)

    def _arrived(self, request_id: str, now: float) -> None:
        state = self._states.get(request_id)
        if state is None or state.arrives_s != now:
            # It was sent again, elsewhere, or lost on its way.
            return
        state.arrives_s = 0.0
        self.cluster.decode[state.placement.decode].join(state, now)
        self._changes.drain(now)

    def _decoded(self, state: RequestState, now: float) -> None:
        self.cluster.release(state)
        generated = state.request.output_tokens if state.resumed is None else state.resumed.request.output_tokens
        self.conductor.decode_done(state.request, generated, state.tbt_s or 0.0, now)
        if self._recorder is not None:
            self._recorder.decoded(state, self.cluster.decode[state.placement.decode].name, now)
        self._end(state.request, COMPLETED, now, state)
        if self.conductor.deferred:
            self._release(now)

    def _end(self, request: TraceRequest, outcome: str, now: float, state: RequestState | None = None) -> None:
        self._states.pop(request.id, None)
        del self._open[request.id]
        served = state is not None and state.first_token_s > 0
        first_token_s = state.first_token_s if state is not None and served else None
        prefill = state.placement.prefill if state is not None else None
        hit_tokens = state.placement.reused_tokens if state is not None else 0
        tokens = int(served)
        resumed = state.resumed if state is not None else self._interrupted.pop(request.id, None)
        if resumed is not None:
            request, tokens = resumed.request, resumed.tokens + tokens
            first_token_s, prefill, hit_tokens = resumed.first_token_s, resumed.prefill, resumed.hit_tokens
            # Its user has seen tokens: that is no clean refusal.
            outcome = FAILED if outcome == REJECTED else outcome
        self._outcomes[request.id] = RequestOutcome(
            id=request.id,
            arrival_s=request.arrival_s,
            input_tokens=request.input_tokens,
            output_tokens=request.output_tokens if outcome == COMPLETED else tokens,
            ttft_s=None if first_token_s is None else first_token_s - request.arrival_s,
            tbt_s=state.tbt_s if state is not None else None,
            hit_tokens=hit_tokens,
            prefill="" if prefill is None else self.cluster.prefill[prefill].name,
            decode=self.cluster.decode[state.placement.decode].name if state is not None else "",
            outcome=outcome,
            finished_s=now,
        )
        self._changes.drain(now)

    def _rebalance(self, argument: int, now: float) -> None:
        """Asks the Conductor, now and then, whether a node is to change its role."""
        self._changes.ask(now)
        roles = self._config.conductor.roles
        if roles is not None and (self._arriving or self._states):
            self.at(now + roles.interval_s, self._rebalance, argument)

    def _join(self, node: int, now: float) -> None:
        if self.cluster.join(node, now):
            self._release(now)

    def _fail(self, node: int, now: float) -> None:
        """A node dies with its KV. Requests that lose by it are placed again, with the tokens that they have got."""
        if not self.cluster.leave(node, now):
            return
        self._changes.died(node, now)
        for state in lost_requests(self.cluster, self.conductor, self._states, node, now, self._send):
            self._rerun(state, now)

    def _rerun(self, state: RequestState, now: float) -> None:
        """Places a request again that lost its KV."""
        request, resumed = state.request, state.resumed
        self.conductor.forget(request)
        self.cluster.release(state)
        del self._states[request.id]
        self._wasted_s += state.compute_s
        if not state.first_token_s:
            self._prefill_s += state.compute_s
        if resumed is not None:
            request = resumed.rest(self.cluster.view.block_size, now)
            self._interrupted[request.id] = resumed
        self._reruns += 1
        self._arrive(request, now)
