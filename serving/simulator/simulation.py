"""A trace played through a simulated cluster: the clock, and the life of each request."""

import heapq
import itertools
from collections.abc import Callable
from typing import Any

from serving.conductor import Conductor, Placement, PrefillReport, Rejection
from serving.request import TraceRequest
from serving.simulator.cluster import Cluster
from serving.simulator.config import ClusterConfig
from serving.simulator.failures import lost_flights
from serving.simulator.flight import Flight, Past
from serving.simulator.nodes import DecodeSide
from serving.simulator.performance import Performance
from serving.simulator.recorder import Recorder
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
        self._flights: dict[str, Flight] = {}
        self._interrupted: dict[str, Past] = {}
        self._prefill_s = self._wasted_s = 0.0
        self._too_long = self._reruns = 0
        self._arriving = True
        self.cluster = Cluster(config, performance, self.at, self._prefilled, self._decoded)
        self.hits_by_tier = dict.fromkeys(self.cluster.tiers, 0)
        self.conductor = Conductor(config.conductor, self.cluster.view, self.cluster.costs)
        self._changes = RoleChanges(self.cluster, self.conductor, self._flights, self.at, self._release)
        if config.conductor.learn and not config.coupled:
            for side in self.cluster.decode:
                if isinstance(side, DecodeSide):
                    side.report = self.conductor.iterated

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
            outcomes,
            self._prefill_s,
            self._wasted_s,
            self.hits_by_tier,
            self.conductor.rejections | ({"request too long": self._too_long} if self._too_long else {}),
            self.conductor.errors(),
            handled + len(trace.requests),
            self._changes.count,
            self._reruns,
            self.cluster.node_s(trace.requests[0].arrival_s, end_s) / 3600,
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
        """Books what the Conductor decided: KV to pull, a place in the queue, a promise of decode."""
        cluster = self.cluster
        node = cluster.prefill[placement.prefill]
        past = self._interrupted.pop(request.id, None) if self._interrupted else None
        flight = Flight(self._open[request.id][0], request, placement, past, now)
        self._flights[request.id] = flight
        flight.ssd_tokens = cluster.ssd_tokens(flight)
        if placement.source is not None:
            flight.pulled_s = cluster.pull(flight, placement.source, now)
        cluster.keep(node.index, request, now)
        cluster.promise(flight)
        node.enqueue(flight, now)
        cluster.rank(node)

    def _count_hits(self, flight: Flight) -> None:
        placement, hits = flight.placement, self.hits_by_tier
        if self.cluster.engines:
            # An engine finds out only now what its pages still hold.
            hits["device"] += placement.reused_tokens
            return
        hits["ssd"] += flight.ssd_tokens
        hits["host"] += placement.reused_tokens - placement.pulled_tokens - flight.ssd_tokens
        stored = placement.source is not None and placement.source >= len(self.cluster.caches)
        hits["store" if stored else "remote"] += placement.pulled_tokens

    def _prefilled(self, flight: Flight, now: float) -> None:
        request, placement, cluster = flight.request, flight.placement, self.cluster
        node = cluster.prefill[placement.prefill]
        cluster.rank(node)
        self._prefill_s += flight.compute_s
        if (past := flight.past) is None:
            self._count_hits(flight)
        else:
            past.gaps.append((now - past.last_token_s, 0.0, 1))
            past.last_token_s = now
        flight.first_token_s = now
        decodes = request.output_tokens > 1
        report = PrefillReport(
            flight.started_s - flight.placed_s,
            flight.pulled_s - flight.placed_s if placement.source is not None else 0.0,
            flight.prefill_s,
            placement.reused_tokens,
            decodes,
        )
        refused = self.conductor.prefill_done(request, report, now)
        if self._recorder is not None:
            self._recorder.prefilled(flight, node.name, now)
        if not decodes or refused is not None:
            cluster.end_promise(flight)
            if refused is not None:
                self._wasted_s += flight.compute_s
            elif past is not None:
                flight.tbt_s = flight.longest_gaps_s([])
            self._end(request, COMPLETED if refused is None else REJECTED, now, flight)
        elif self._config.coupled:
            cluster.decode[placement.decode].join(flight, now)
        else:
            self._send(flight, flight.started_s, now)
        if cluster.store is not None:
            # Behind what decode waits for.
            cluster.store.write(request, cluster.nics[node.index], cluster.view.directory, cluster.view.block_size, now)

    def _send(self, flight: Flight, since_s: float, now: float) -> None:
        """Sends all KV of a prompt to its decode node: from `since_s` on layer by layer, the last one after prefill."""
        flight.arrives_s = self.cluster.hand_over(flight, since_s, now)
        self.at(flight.arrives_s, self._arrived, flight.request.id)

    def _arrived(self, request_id: str, now: float) -> None:
        flight = self._flights.get(request_id)
        if flight is None or flight.arrives_s != now:
            # It was sent again, elsewhere, or lost on its way.
            return
        flight.arrives_s = 0.0
        self.cluster.decode[flight.placement.decode].join(flight, now)
        self._changes.drain(now)

    def _decoded(self, flight: Flight, now: float) -> None:
        self.cluster.end_promise(flight)
        generated = flight.request.output_tokens if flight.past is None else flight.past.request.output_tokens
        self.conductor.decode_done(flight.request, generated, flight.tbt_s or 0.0, now)
        if self._recorder is not None:
            self._recorder.decoded(flight, self.cluster.decode[flight.placement.decode].name, now)
        self._end(flight.request, COMPLETED, now, flight)
        if self.conductor.deferred:
            self._release(now)

    def _end(self, request: TraceRequest, outcome: str, now: float, flight: Flight | None = None) -> None:
        self._flights.pop(request.id, None)
        del self._open[request.id]
        served = flight is not None and flight.first_token_s > 0
        first_token_s = flight.first_token_s if flight is not None and served else None
        prefill = flight.placement.prefill if flight is not None else None
        hit_tokens = flight.placement.reused_tokens if flight is not None else 0
        tokens = int(served)
        past = flight.past if flight is not None else self._interrupted.pop(request.id, None)
        if past is not None:
            request, tokens = past.request, past.tokens + tokens
            first_token_s, prefill, hit_tokens = past.first_token_s, past.prefill, past.hit_tokens
            # Its user has seen tokens: that is no clean refusal.
            outcome = FAILED if outcome == REJECTED else outcome
        self._outcomes[request.id] = RequestOutcome(
            request.id,
            request.arrival_s,
            request.input_tokens,
            request.output_tokens if outcome == COMPLETED else tokens,
            None if first_token_s is None else first_token_s - request.arrival_s,
            flight.tbt_s if flight is not None else None,
            hit_tokens,
            "" if prefill is None else self.cluster.prefill[prefill].name,
            self.cluster.decode[flight.placement.decode].name if flight is not None else "",
            outcome,
            now,
        )
        self._changes.drain(now)

    def _rebalance(self, argument: int, now: float) -> None:
        """Asks the Conductor, now and then, whether a node is to change its role."""
        self._changes.ask(now)
        roles = self._config.conductor.roles
        if roles is not None and (self._arriving or self._flights):
            self.at(now + roles.interval_s, self._rebalance, argument)

    def _join(self, node: int, now: float) -> None:
        if self.cluster.join(node, now):
            self._release(now)

    def _fail(self, node: int, now: float) -> None:
        """A node dies with its KV. Requests that lose by it are placed again, with the tokens that they have got."""
        if not self.cluster.leave(node, now):
            return
        self._changes.died(node, now)
        for flight in lost_flights(self.cluster, self.conductor, self._flights, node, now, self._send):
            self._rerun(flight, now)

    def _rerun(self, flight: Flight, now: float) -> None:
        """Places a request again that lost its KV."""
        request, past = flight.request, flight.past
        self.conductor.forget(request)
        self.cluster.end_promise(flight)
        del self._flights[request.id]
        self._wasted_s += flight.compute_s
        if not flight.first_token_s:
            self._prefill_s += flight.compute_s
        if past is not None:
            request = past.rest(self.cluster.view.block_size, now)
            self._interrupted[request.id] = past
        self._reruns += 1
        self._arrive(request, now)
