"""The simulated cluster: a clock, nodes, and the Conductor that would schedule the live one."""

import heapq
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvcache.prefix_index import PrefixIndex
from serving.conductor import ClusterView, Conductor, Placement, PrefillReport, Rejection
from serving.conductor.pipeline import PipelineTimeModel
from serving.conductor.roles import DECODE, PREFILL
from serving.simulator.cache import NodeCache
from serving.simulator.config import ClusterConfig as ClusterConfig
from serving.simulator.flight import Flight, Past
from serving.simulator.nodes import CoupledNode, DecodeSide, Nic, PrefillSide, transfer
from serving.simulator.performance import Performance
from serving.simulator.prefill_group import PrefillGroup
from serving.simulator.recorder import Recorder
from serving.simulator.result import SimulationResult as SimulationResult
from serving.simulator.store import RemoteStore
from serving.workload.outcomes import COMPLETED, FAILED, REJECTED, RequestOutcome
from serving.workload.prompts import prompt_tokens
from serving.workload.requests import Trace, TraceRequest

if TYPE_CHECKING:
    from serving.simulator.engine_node import EngineNode


class Simulation:
    """One run of a trace through a cluster."""

    def __init__(self, config: ClusterConfig, performance: Performance, recorder: Recorder | None = None) -> None:
        self.config = config
        self._performance = performance
        self._recorder = recorder
        self._events: list[tuple[float, int, Callable[[int, float], None], int]] = []
        self._numbers = itertools.count()
        self._outcomes: dict[int, RequestOutcome] = {}
        self._flights: dict[int, Flight] = {}
        self._prefill_s = self._wasted_s = 0.0
        self._too_long = self._reruns = self._switches = 0
        self._arriving = True
        self._role = [PREFILL] * config.groups + [DECODE] * config.decode
        # The node that is changing its role, and from when on it will serve again; 0 as long as it is not empty.
        self._changing: int | None = None
        self._ready_s = 0.0
        self._interrupted: dict[int, Past] = {}
        self._store: RemoteStore | None = None
        # [node, from, until] of nodes; those that are up have no end yet.
        self._lives: list[tuple[int, float, float]] = []
        self._up: dict[int, float] = {}
        self._engines = bool(config.coupled and performance.engine and not config.chunk)
        tiers = ("device",) if self._engines else ("host", "ssd", "remote", "store")
        self.hits_by_tier = dict.fromkeys(tiers, 0)
        self.nics = [self._nic(node) for node in range(config.instances)]
        self._build()

    def _build(self) -> None:
        config, performance = self.config, self._performance
        costs = performance.costs
        if config.cpp > 1:
            costs = performance.group(config.cpp, config.prefill_chunk)
        self.caches = [
            NodeCache(config.host_blocks * nic.count, config.ssd_blocks * nic.count, config.eviction)
            for nic in self.nics
        ]
        self.prefill: list[PrefillSide | CoupledNode | EngineNode] = []
        self.decode: list[DecodeSide | EngineNode] = []
        coupled = [self._coupled(index) for index in range(config.coupled)]
        if coupled:
            self.prefill.extend(coupled)
            self.decode.extend(coupled)
        else:
            roles = config.conductor.roles is not None
            # Prefill instances have the index of their node, decode instances that of `_decode_index`; where roles
            # follow load every node has a side of either kind.
            for i, cache in enumerate(self.caches if roles else self.caches[: config.groups]):
                given = performance, self.nics, cache, self.at, self._prefilled, config.layer_wise
                if isinstance(costs, PipelineTimeModel):
                    self.prefill.append(PrefillGroup(f"p{i}", i, *given, costs))
                else:
                    self.prefill.append(PrefillSide(f"p{i}", i, *given))
            for i in range(config.instances if roles else config.decode):
                self.decode.append(DecodeSide(f"d{i}", i, performance, config.max_batch, self.at, self._decoded))
        if config.store_blocks:
            cache, nic = NodeCache(config.store_blocks, 0, config.eviction), Nic(config.store_nics)
            self._store = RemoteStore(len(self.nics), cache, nic, performance)
            self.nics.append(nic)
        self.view = ClusterView([*self.prefill], [*self.decode], 512, coupled=bool(coupled))
        if config.ssd_blocks and not self._engines:
            self.view.directory, self.view.slow_token = PrefixIndex(2), performance.ssd_token / config.cpp
        for node in range(config.instances):
            joins = [seconds for seconds, other in config.joins if other == node]
            failures = [seconds for seconds, other in config.failures if other == node]
            if not joins or min(failures, default=math.inf) < min(joins):
                self._up[node] = 0.0
                self._serve(node, 0.0)
        self.conductor = Conductor(config.conductor, self.view, costs)
        if config.conductor.learn and not coupled:
            for side in self.decode:
                if isinstance(side, DecodeSide):
                    side.report = self.conductor.iterated

    def _nic(self, node: int) -> Nic:
        """Of a node or a group of them."""
        return Nic(self.config.cpp if node < self.config.groups else 1)

    def _coupled(self, index: int) -> "CoupledNode | EngineNode":
        config, performance, cache = self.config, self._performance, self.caches[index]
        if not self._engines:
            return CoupledNode(
                f"c{index}",
                index,
                performance,
                config.max_batch,
                self.at,
                self._decoded,
                cache,
                self._prefilled,
                config.chunk,
            )
        # Here and not above: the engine's scheduler brings JAX with it, which no other node needs.
        from serving.simulator.engine_node import EngineNode

        def prompt(request: TraceRequest) -> tuple[int, ...]:
            return prompt_tokens(request, self.view.block_size)

        seed = config.conductor.seed
        return EngineNode(f"c{index}", index, performance, self.at, self._decoded, cache, self._prefilled, prompt, seed)

    def at(self, time: float, handler: Callable[[int, float], None], argument: int) -> None:
        """Calls `handler(argument, time)` when the clock gets there."""
        heapq.heappush(self._events, (time, next(self._numbers), handler, argument))

    def run(self, trace: Trace, progress: Callable[[int], object] | None = None) -> SimulationResult:
        """Plays a trace to its end. `progress` is told how many requests have arrived, now and then."""
        self.view.block_size = trace.block_size
        for seconds, node in self.config.failures:
            self.at(seconds, self._fail, node)
        for seconds, node in self.config.joins:
            self.at(seconds, self._join, node)
        if (roles := self.config.conductor.roles) is not None:
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
                recorder.sample(self, arrival_s)
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
                recorder.sample(self, time)
        for request in self.conductor.drain():
            self._end(request, REJECTED, time)
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
            self._switches,
            self._reruns,
            self._node_s(trace.requests[0].arrival_s, end_s) / 3600,
        )

    def _node_s(self, begin_s: float, end_s: float) -> float:
        """Seconds of all nodes that were up in between."""
        lives = [*self._lives, *((node, since, end_s) for node, since in self._up.items())]
        return sum(
            self.nics[node].count * max(0.0, min(until, end_s) - max(since, begin_s)) for node, since, until in lives
        )

    def _arrive(self, request: TraceRequest, now: float) -> None:
        engine = self._performance.engine if self._engines else None
        if engine is not None and not engine.fits(request.input_tokens, request.output_tokens):
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
            request, decision = decided
            if isinstance(decision, Rejection):
                self._end(request, REJECTED, now)
            else:
                self._launch(request, decision, now)

    def _launch(self, request: TraceRequest, placement: Placement, now: float) -> None:
        """Books what the Conductor decided: KV to pull, a place in the queue, a promise of decode."""
        node = self.prefill[placement.prefill]
        flight = Flight(request, placement, self._interrupted.pop(request.id, None) if self._interrupted else None, now)
        self._flights[request.id] = flight
        if self.config.ssd_blocks and not self._engines and placement.reused_tokens > placement.pulled_tokens:
            size, local = self.view.block_size, placement.reused_tokens - placement.pulled_tokens
            flight.ssd_tokens = min(local, node.cache.on_ssd(request.block_ids[: -(-local // size)]) * size)
        if placement.source is not None:
            self._pull(flight, placement.source, now)
        if request.block_ids and self.config.host_blocks:
            self._keep(node.index, node.cache, request, now)
        decode = self.decode[placement.decode]
        self.view.decode_order.set(decode.index, decode.assign(flight, 1))
        node.enqueue(flight, now)
        self._rank(node)

    def _keep(self, index: int, cache: NodeCache, request: TraceRequest, now: float) -> None:
        """Puts a prompt's blocks into a node's cache, and tells the directory what that moved."""
        directory = self.view.directory
        directory.add(index, request.block_ids)
        demoted, lost = cache.touch(request.block_ids, now)
        if self.config.ssd_blocks:
            directory.remove(index, request.block_ids, tier=1)
            directory.add(index, demoted, tier=1)
            directory.remove(index, demoted, tier=0)
        if lost:
            directory.remove(index, lost)

    def _pull(self, flight: Flight, source: int, now: float) -> None:
        """Has another holder send a prefix; what it keeps on SSD it must read first, layer by layer as it sends."""
        placement, size = flight.placement, self.view.block_size
        seconds = self._performance.costs.transfer_s(placement.pulled_tokens)
        flight.pulled_s = transfer(self.nics[source], self.nics[placement.prefill], seconds, now)
        if self.config.ssd_blocks and source < len(self.caches):
            local = placement.reused_tokens - placement.pulled_tokens
            pulled = flight.request.block_ids[local // size : -(-placement.reused_tokens // size)]
            read_s = self._performance.ssd_token * self.caches[source].on_ssd(pulled) * size
            flight.pulled_s = max(flight.pulled_s, now + read_s / self.nics[source].count)

    def _count_hits(self, flight: Flight) -> None:
        placement, hits = flight.placement, self.hits_by_tier
        if self._engines:
            # An engine finds out only now what its pages still hold.
            hits["device"] += placement.reused_tokens
            return
        hits["ssd"] += flight.ssd_tokens
        hits["host"] += placement.reused_tokens - placement.pulled_tokens - flight.ssd_tokens
        hits["remote" if placement.source is None or placement.source < len(self.caches) else "store"] += (
            placement.pulled_tokens
        )

    def _rank(self, node: "PrefillSide | CoupledNode | EngineNode") -> None:
        if node.index in self.view.prefill_order:
            load = node.free_at_s if isinstance(node, PrefillSide) else float(node.assigned)
            self.view.prefill_order.set(node.index, load)

    def _unassign(self, flight: Flight) -> None:
        decode = self.decode[flight.placement.decode]
        load = decode.assign(flight, -1)
        if decode.index in self.view.decode_order:
            self.view.decode_order.set(decode.index, load)
        if self.view.coupled:
            self._rank(self.prefill[decode.index])

    def _prefilled(self, flight: Flight, now: float) -> None:
        request, placement = flight.request, flight.placement
        node = self.prefill[placement.prefill]
        self._rank(node)
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
        decode = self.decode[placement.decode]
        if not decodes or refused is not None:
            self._unassign(flight)
            if refused is not None:
                self._wasted_s += flight.compute_s
            elif past is not None:
                flight.tbt_s = flight.longest_gaps_s([])
            self._end(request, COMPLETED if refused is None else REJECTED, now, flight)
        elif self.view.coupled:
            decode.join(flight, now)
        else:
            self._send(flight, flight.started_s, now)
        if self._store is not None:
            # Behind what decode waits for.
            self._store.write(request, self.nics[node.index], self.view.directory, self.view.block_size, now)

    def _send(self, flight: Flight, since_s: float, now: float) -> None:
        """Sends all KV of a prompt to its decode node: from `since_s` on layer by layer, the last one after prefill."""
        flight.arrives_s = self._handover_s(flight, since_s, now)
        self.at(flight.arrives_s, self._arrived, flight.request.id)

    def _handover_s(self, flight: Flight, since_s: float, now: float) -> float:
        seconds = self._performance.costs.transfer_s(flight.request.input_tokens)
        sender, receiver = self.nics[flight.placement.prefill], self.nics[self._decode_node(flight.placement.decode)]
        if not self.config.layer_wise:
            return transfer(sender, receiver, seconds, now)
        last_layer_s = seconds / self._performance.layers
        return max(now + last_layer_s, transfer(sender, receiver, seconds, since_s))

    def _arrived(self, request_id: int, now: float) -> None:
        flight = self._flights.get(request_id)
        if flight is None or flight.arrives_s != now:
            # It was sent again, elsewhere, or lost on its way.
            return
        flight.arrives_s = 0.0
        self.decode[flight.placement.decode].join(flight, now)
        if self._changing is not None:
            self._drain(now)

    def _decoded(self, flight: Flight, now: float) -> None:
        self._unassign(flight)
        generated = flight.request.output_tokens if flight.past is None else flight.past.request.output_tokens
        self.conductor.decode_done(flight.request, generated, flight.tbt_s or 0.0, now)
        if self._recorder is not None:
            self._recorder.decoded(flight, self.decode[flight.placement.decode].name, now)
        self._end(flight.request, COMPLETED, now, flight)
        if self.conductor.deferred:
            self._release(now)

    def _end(self, request: TraceRequest, outcome: str, now: float, flight: Flight | None = None) -> None:
        self._flights.pop(request.id, None)
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
            "" if prefill is None else self.prefill[prefill].name,
            self.decode[flight.placement.decode].name if flight is not None else "",
            outcome,
            now,
        )
        if self._changing is not None:
            self._drain(now)

    def _decode_index(self, node: int) -> int:
        """Of a node's decode side: the decode pool first, then nodes that began in the other one."""
        prefill, decode = self.config.groups, self.config.decode
        return node if self.config.coupled else node - prefill if node >= prefill else decode + node

    def _decode_node(self, index: int) -> int:
        prefill, decode = self.config.groups, self.config.decode
        return prefill + index if index < decode else index - decode

    def _rebalance(self, argument: int, now: float) -> None:
        """Asks the Conductor, now and then, whether a node is to change its role."""
        change = self.conductor.rebalance(now)
        if change is not None:
            self._changing = change.index if change.role == PREFILL else self._decode_node(change.index)
        if self._changing is not None:
            self._drain(now)
        roles = self.config.conductor.roles
        if roles is not None and (self._arriving or self._flights):
            self.at(now + roles.interval_s, self._rebalance, argument)

    def _drain(self, now: float) -> None:
        """Lets the node change its role once nothing is left on it; its KVCache does not go with it."""
        node = self._changing
        if node is None or self._ready_s:
            return
        if self._role[node] == DECODE:
            idle = not self.decode[self._decode_index(node)].assigned
        else:
            # Its KV may still be on its way, to decode nodes or to others that reuse it.
            idle = not any(
                (flight.placement.prefill == node and (not flight.first_token_s or flight.arrives_s))
                or (flight.placement.source == node and flight.pulled_s > now and not flight.first_token_s)
                for flight in self._flights.values()
            )
        if not idle:
            return
        if self._role[node] == PREFILL:
            self.view.directory.remove(node, self.caches[node].clear())
        self._role[node] = PREFILL if self._role[node] == DECODE else DECODE
        self._ready_s = now + self.config.switch_s
        self.at(self._ready_s, self._switched, node)

    def _switched(self, node: int, now: float) -> None:
        if node != self._changing or now != self._ready_s:
            # It died meanwhile.
            return
        self._changing, self._ready_s = None, 0.0
        self._switches += 1
        self.conductor.rebalanced(now)
        self._serve(node, now)
        self._release(now)

    def _join(self, node: int, now: float) -> None:
        """A node starts to serve, with an empty cache."""
        if node in self._up:
            return
        self._up[node] = now
        self._serve(node, now)
        self._release(now)

    def _serve(self, node: int, now: float) -> None:
        """Gives a node its place in the pool of its role."""
        if self.config.coupled or self._role[node] == PREFILL:
            self.view.prefill_order.set(node, now)
        if self.config.coupled or self._role[node] == DECODE:
            index = self._decode_index(node)
            self.view.decode_order.set(index, self.decode[index].times.decode_s(0, 0))

    def _fail(self, node: int, now: float) -> None:
        """A node dies with its KV. Requests that lose by it are placed again, with the tokens that they have got."""
        if node not in self._up:
            return
        self._lives.append((node, self._up.pop(node), now))
        self.nics[node] = self._nic(node)
        if node == self._changing:
            self._changing, self._ready_s = None, 0.0
            self.conductor.rebalanced(now)
        lost: list[Flight] = []
        if self.config.coupled or self._role[node] == PREFILL:
            self.view.prefill_order.discard(node)
            self.view.directory.remove(node, self.caches[node].clear())
            lost += self.prefill[node].fail(now)
            lost += self._cut_off(node, now)
        else:
            index = self._decode_index(node)
            self.view.decode_order.discard(index)
            lost += self.decode[index].fail(now)
            lost += self._redirect(index, now)
        if self.config.coupled:
            self.view.decode_order.discard(node)
        for flight in sorted(lost, key=lambda flight: flight.request.id):
            self._rerun(flight, now)

    def _cut_off(self, prefill: int, now: float) -> list[Flight]:
        """Requests whose KV was on its way from a prefill node that died: to their decode node, or to be reused."""
        lost = []
        for flight in self._flights.values():
            if flight.placement.prefill == prefill and flight.arrives_s >= now:
                flight.remember([], flight.first_token_s)
                lost.append(flight)
            elif flight.placement.source == prefill and flight.pulled_s > now and not flight.first_token_s:
                self._withdraw(flight, now)
                lost.append(flight)
        return lost

    def _redirect(self, decode: int, now: float) -> list[Flight]:
        """Finds other decode nodes for requests promised to one that died; those for which there is none."""
        lost = []
        for flight in self._flights.values():
            if flight.placement.decode != decode or (flight.first_token_s and flight.arrives_s < now):
                continue
            placement = self.conductor.redirect(flight.request)
            if placement is None:
                lost.append(flight)
                continue
            self._unassign(flight)
            flight.placement = placement
            side = self.decode[placement.decode]
            self.view.decode_order.set(side.index, side.assign(flight, 1))
            if flight.first_token_s:
                self._send(flight, now, now)
        for flight in lost:
            if flight.first_token_s:
                flight.remember([], flight.first_token_s)
            else:
                self._withdraw(flight, now)
        return lost

    def _withdraw(self, flight: Flight, now: float) -> None:
        """Takes an unfinished prefill back from a node, and with it the blocks that it would have brought."""
        placement, size = flight.placement, self.view.block_size
        node = self.prefill[placement.prefill]
        if isinstance(node, PrefillSide):
            node.withdraw(flight, now)
            self._rank(node)
            fresh = flight.request.block_ids[(placement.reused_tokens - placement.pulled_tokens) // size :]
            self.view.directory.remove(placement.prefill, node.cache.discard(fresh))

    def _rerun(self, flight: Flight, now: float) -> None:
        """Places a request again that lost its KV."""
        request, past = flight.request, flight.past
        self.conductor.forget(request)
        self._unassign(flight)
        del self._flights[request.id]
        self._wasted_s += flight.compute_s
        if not flight.first_token_s:
            self._prefill_s += flight.compute_s
        if past is not None:
            request = past.rest(self.view.block_size, now)
            self._interrupted[request.id] = past
        self._reruns += 1
        self._arrive(request, now)
