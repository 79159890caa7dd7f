"""The Conductor: one decision per request, and the reports that keep its mirror of the cluster true.

It reads no clock: every method takes `now`, in seconds on the caller's clock. Live and simulated clusters call the same
methods: `schedule` at arrival; `prefill_done` and `decode_done` as a request goes on; `release` when something ended,
for requests that were told to wait; `redirect` and `forget` when an instance died; where roles follow load, `rebalance`
now and then.
"""

import dataclasses
import heapq
import itertools
import math

from serving.conductor.admission import AdmissionContext, admission_policy
from serving.conductor.errors import ConductorError
from serving.conductor.estimators import Occupancy, OutputLengths, TimeEstimator, TimeModel
from serving.conductor.learned_limit import LearnedLimit
from serving.conductor.mirror import Assignment, ClusterMirror, DecodeMirror
from serving.conductor.output_predictor import OutputPredictor
from serving.conductor.pipeline import PipelineTimeModel
from serving.conductor.placement import PrefillCandidate, placement_policy
from serving.conductor.roles import DECODE, PREFILL, RoleChange, RoleConfig, RoleController
from serving.conductor.types import SLO, Deferral, Placement, PrefillReport, Rejection
from serving.request import Request

QUEUE_ORDERS = ("fifo", "shortest")
# One priority level outweighs any waiting time.
_PRIORITY_S = 1e9
_MANY_TENANTS = 10_000


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConductorConfig:
    """How to schedule.

    Attributes:
        placement: one of `PLACEMENTS`.
        admission: one of `ADMISSIONS`.
        threshold: kvcache_balancing_threshold of Algorithm 1.
        slo: limits of TTFT and TBT.
        queue_order: "fifo", or "shortest": short prefills first, with ageing: a request is overtaken only by those that
            arrive within `patience` times the difference of their prefill times.
        patience: of "shortest".
        fair: share prefill evenly among tenants that compete (start-time fair queueing, Goyal et al. 1996).
        learned_limit: with any admission, what "goodput" does: scale the TBT limit by a learned `LearnedLimit`.
        learn: refine the time estimates from what instances report.
        roles: when instances change between the pools; `None` = never.
        seed: of random placement.
    """

    placement: str = "kvcache_centric"
    admission: str = "none"
    threshold: float = 1.0
    slo: SLO = dataclasses.field(default_factory=SLO)
    queue_order: str = "fifo"
    patience: float = 3.0
    fair: bool = False
    learned_limit: bool = False
    learn: bool = False
    roles: RoleConfig | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.queue_order not in QUEUE_ORDERS:
            raise ConductorError(f"No queue order `{self.queue_order}`; known: {', '.join(QUEUE_ORDERS)}.")
        if not (self.slo.ttft_s > 0 and self.slo.tbt_s > 0):
            raise ConductorError(f"SLOs are {self.slo.ttft_s} s and {self.slo.tbt_s} s; both must be above 0.")


class Conductor:
    """Places, admits, queues and learns."""

    def __init__(self, config: ConductorConfig, mirror: ClusterMirror, costs: TimeModel) -> None:
        self.config = config
        self.mirror = mirror
        self.estimator = TimeEstimator(costs, config.learn)
        self.lengths = OutputLengths()
        self.outputs = OutputPredictor()
        self.occupancy = Occupancy()
        self.rejections: dict[str, int] = {}
        self._place = placement_policy(config.placement, threshold=config.threshold, seed=config.seed)
        self._admission = admission_policy(config.admission)
        self.limit = LearnedLimit()
        self._accepted: dict[str, Assignment] = {}
        # Deferred requests, and a heap of (rank, number, id); ids that are no longer in `_waiting` are skipped when
        # popped. Numbers count arrivals; a lost request keeps its own for when it is scheduled again.
        self._waiting: dict[str, tuple[int, Request]] = {}
        self._ranks: list[tuple[float, int, str]] = []
        self._numbers = itertools.count()
        self._lost: dict[str, int] = {}
        # Start-time fair queueing: `_virtual_s` is the virtual clock (prefill seconds per backlogged tenant);
        # `_turns_s[tenant]` is that tenant's next start tag.
        self._virtual_s = 0.0
        self._turns_s: dict[str, float] = {}
        self._context_tokens = 4096.0
        self._roles = RoleController(config.roles) if config.roles is not None else None

    def schedule(self, request: Request, now: float) -> Placement | Rejection | Deferral:
        """Decides on one request at its arrival."""
        number = self._lost.pop(request.id) if request.id in self._lost else next(self._numbers)
        if not self.mirror.prefill_order or not self.mirror.decode_order:
            return self._refuse(Rejection("no instance", 0.0, 0.0, 1.0))
        self._context_tokens += (request.input_tokens - self._context_tokens) * 0.01
        queue_key = self._queue_key(request)
        candidate = self._place(self.mirror, self.estimator.model, request, queue_key, now)
        decision = self._decide(request, number, candidate, queue_key, now)
        if self._roles is not None:
            self._watch(self._roles, decision, candidate, now)
        if isinstance(decision, Deferral):
            self._waiting[request.id] = number, request
            rank = self.outputs.predict(request.keys) if self._admission.prefers_short else queue_key
            heapq.heappush(self._ranks, (rank, number, request.id))
        return decision

    def release(self, now: float) -> tuple[Request, Placement | Rejection] | None:
        """Decides on the first deferred request, or says that there is still no room; ask again until it does."""
        if not self._waiting or not self.mirror.prefill_order or not self.mirror.decode_order:
            return None
        _, oldest = next(iter(self._waiting.values()))
        waited_s = now - oldest.arrival_s
        if waited_s > self.config.slo.ttft_s:
            del self._waiting[oldest.id]
            return oldest, self._refuse(Rejection("ttft", waited_s, 0.0, self.occupancy.decode_s / 4))
        while self._ranks[0][-1] not in self._waiting:
            heapq.heappop(self._ranks)
        number, request = self._waiting[self._ranks[0][-1]]
        queue_key = self._queue_key(request)
        candidate = self._place(self.mirror, self.estimator.model, request, queue_key, now)
        decision = self._decide(request, number, candidate, queue_key, now)
        if isinstance(decision, Deferral):
            return None
        del self._waiting[request.id]
        return request, decision

    def drain(self) -> list[Request]:
        """Takes back all requests that still wait: nothing will come that could release them."""
        waiting = [request for _, request in self._waiting.values()]
        self._waiting.clear()
        self._ranks.clear()
        return waiting

    @property
    def in_flight(self) -> int:
        """Requests that were placed and have not ended."""
        return len(self._accepted)

    @property
    def deferred(self) -> int:
        """Requests that wait at the Conductor."""
        return len(self._waiting)

    def loads(self, now: float) -> tuple[dict[str, float], dict[str, float]]:
        """Loads of prefill and decode instances by name, as section 7 of the arXiv version defines them: the predicted
        wait for prefill over the limit of TTFT, and the predicted iteration time over that of TBT.
        """
        mirror, slo, costs = self.mirror, self.config.slo, self.estimator.model
        prefill = [mirror.prefill[index] for _, index in mirror.prefill_order]
        decode = [mirror.decode[index] for _, index in mirror.decode_order]
        return (
            {node.name: node.queue_s(now, math.inf) / slo.ttft_s for node in prefill},
            {node.name: costs.decode_s(node.present, node.present_tokens) / slo.tbt_s for node in decode},
        )

    def errors(self) -> dict[str, float]:
        """Mean errors of all estimates that something was observed for; see `TimeEstimator.errors`."""
        errors = self.estimator.errors()
        if self.outputs.error.observations:
            errors["output_tokens"] = self.outputs.error.absolute
        return errors

    def _turn_s(self, request: Request) -> float:
        """Virtual time at which a request is its tenant's turn: now, or after what the tenant has waiting."""
        return max(self._virtual_s, self._turns_s.get(request.tenant, 0.0))

    def _queue_key(self, request: Request) -> float:
        queue_key = _PRIORITY_S * request.priority + (self._turn_s(request) if self.config.fair else request.arrival_s)
        if self.config.queue_order == "shortest":
            queue_key += self.config.patience * self.estimator.model.prefill_s(request.input_tokens, 0)
        return queue_key

    def rebalance(self, now: float) -> RoleChange | None:
        """The instance that is to change its role now, if any; it gets nothing new. Tell `rebalanced` when it has."""
        if self._roles is None:
            return None
        return self._roles.decide(self.mirror, self.estimator.model, self.config.slo, now)

    def rebalanced(self, now: float) -> None:
        """The instance that was to change its role has joined its new pool, or has died on the way."""
        if self._roles is not None:
            self._roles.switched(now)

    @staticmethod
    def _watch(
        roles: RoleController, decision: Placement | Rejection | Deferral, candidate: PrefillCandidate, now: float
    ) -> None:
        """Tells which pool a request was refused for."""
        if isinstance(decision, Placement):
            roles.arrived(now)
        elif isinstance(decision, Rejection) and decision.reason == "ttft":
            roles.arrived(now, PREFILL)
            roles.work(candidate.prefill_s, now)
        else:
            roles.arrived(now, DECODE)

    def _decide(
        self, request: Request, number: int, candidate: PrefillCandidate, queue_key: float, now: float
    ) -> Placement | Rejection | Deferral:
        costs, mirror, slo = self.estimator.model, self.mirror, self.config.slo
        index = self._select_decode(request, candidate.index)
        if index is None:
            return self._refuse(Rejection("kv capacity", candidate.ttft_s, 0.0, self.occupancy.decode_s))
        decode = mirror.decode[index]
        admission, reason, tbt_s = self._admission, None, 0.0
        output_tokens = self.outputs.predict(request.keys) if admission.per_request else self.lengths.mean
        if admission.looks:
            context = AdmissionContext(
                mirror=mirror,
                costs=costs,
                occupancy=self.occupancy,
                lengths=self.lengths,
                candidate=candidate,
                decode=decode,
                context_tokens=self._context_tokens,
                now=now,
                predictor=self.outputs,
                decoding=_decoding(decode) if admission.per_request else (),
                output_tokens=output_tokens,
            )
            reason, tbt_s = admission.reason(context, slo, now - request.arrival_s, self.limit.value)
        if reason == "tbt" and self._admission.defers:
            return Deferral(tbt_s)
        if reason is not None:
            over_s = candidate.ttft_s - slo.ttft_s if reason == "ttft" else self.occupancy.decode_s / 4
            return self._refuse(Rejection(reason, candidate.ttft_s, tbt_s, max(over_s, 0.1)))
        tbt_s = costs.decode_s(decode.assigned + 1, decode.assigned_tokens + request.input_tokens)
        placement = Placement(
            prefill=candidate.index,
            decode=index,
            reused_tokens=candidate.reused_tokens,
            source=candidate.source,
            fetched_tokens=candidate.fetched_tokens,
            predicted_queue_s=candidate.queue_s,
            predicted_fetch_s=candidate.fetch_s,
            predicted_prefill_s=candidate.prefill_s,
            predicted_tbt_s=tbt_s,
            queue_key=queue_key,
        )
        turn_s = self._turn_s(request)
        work_s = candidate.prefill_s
        if isinstance(costs, PipelineTimeModel):
            work_s = costs.occupied_s(request.input_tokens, candidate.reused_tokens)
        assignment = Assignment(
            number=number,
            request=request,
            placement=placement,
            placed_s=now,
            prefill_end_s=now + candidate.ttft_s,
            work_s=work_s,
            turn_s=turn_s,
            output_tokens=output_tokens,
        )
        self._accepted[request.id] = assignment
        mirror.place(assignment)
        self.occupancy.accept(now + candidate.ttft_s)
        if self._roles is not None:
            self._roles.work(candidate.prefill_s, now)
        if self.config.fair:
            self._turns_s[request.tenant] = turn_s + candidate.prefill_s
            if len(self._turns_s) > _MANY_TENANTS:
                # Whoever has nothing waiting needs no entry.
                self._turns_s = {name: turn for name, turn in self._turns_s.items() if turn > self._virtual_s}
        return placement

    def _select_decode(self, request: Request, prefill: int) -> int | None:
        """The least predicted TBT among the instances with room for the prompt and a mean output."""
        needed = request.input_tokens + self.lengths.mean
        candidates = [prefill] if self.mirror.coupled else (index for _, index in self.mirror.decode_order)
        for index in candidates:
            decode = self.mirror.decode[index]
            if decode.assigned_tokens + needed <= decode.kv_capacity_tokens:
                return index
        return None

    def _refuse(self, rejection: Rejection) -> Rejection:
        self.rejections[rejection.reason] = self.rejections.get(rejection.reason, 0) + 1
        return rejection

    def prefill_done(self, request: Request, report: PrefillReport, now: float) -> Rejection | None:
        """The first token is there. Returns a rejection where the decode instance's double-check fails: then the
        prefill was wasted.
        """
        accepted = self._accepted[request.id]
        self.mirror.prefilled(accepted)
        self._virtual_s = max(self._virtual_s, accepted.turn_s)
        self._learn_prefill(request, accepted, report, now)
        if not report.decodes:
            self.occupancy.drop(accepted.prefill_end_s)
            self._drop(accepted)
            self._learn_output(request, accepted, 1)
            return None
        if self._admission.checks_late:
            decode = self.mirror.decode[accepted.placement.decode]
            batch, tokens = decode.present + 1, decode.present_tokens + request.input_tokens
            tbt_s = self.estimator.model.decode_s(batch, tokens)
            if tbt_s > self.config.slo.tbt_s:
                self.occupancy.drop(accepted.prefill_end_s)
                self._drop(accepted)
                return self._refuse(Rejection("tbt, after prefill", now - request.arrival_s, tbt_s, 1.0))
        self.occupancy.start(accepted.prefill_end_s, now)
        self.mirror.decoding(accepted, now)
        return None

    def _learn_prefill(self, request: Request, accepted: Assignment, report: PrefillReport, now: float) -> None:
        estimator, placement = self.estimator, accepted.placement
        estimator.observe_prefill(
            request.input_tokens, report.reused_tokens, placement.predicted_prefill_s, report.execution_s
        )
        estimator.queue.observe(placement.predicted_queue_s, report.started_s - accepted.placed_s)
        if report.fetched_s is not None:
            estimator.transfer.observe(placement.predicted_fetch_s, report.fetched_s - accepted.placed_s)
        estimator.ttft.observe(accepted.prefill_end_s - request.arrival_s, now - request.arrival_s)

    def observe_iterations(self, batch: int, tokens: float, seconds: float) -> None:
        """A decode instance ran an iteration, or several of these means."""
        self.estimator.observe_decode(batch, tokens, seconds)

    def decode_done(self, request: Request, output_tokens: int, tbt_s: float, now: float) -> None:
        """A request ended with so many tokens, at this TBT."""
        accepted = self._accepted[request.id]
        self._drop(accepted)
        if accepted.decode_start_s is not None:
            self.occupancy.finish(accepted.decode_start_s, now)
        self._learn_output(request, accepted, output_tokens)
        if tbt_s > 0:
            self.estimator.tbt.observe(accepted.placement.predicted_tbt_s, tbt_s)
        if self._admission.learns_limit or self.config.learned_limit:
            self.limit.observe(tbt_s > self.config.slo.tbt_s)

    def _learn_output(self, request: Request, accepted: Assignment, tokens: int) -> None:
        self.lengths.observe(tokens)
        if self._admission.per_request:
            full = request.keys[: request.input_tokens // self.mirror.block_size]
            self.outputs.observe(full, accepted.output_tokens, tokens)

    def redirect(self, request: Request) -> Placement | None:
        """Another decode instance for an accepted request whose own has left; `None` where none has room."""
        accepted = self._accepted[request.id]
        index = self._select_decode(request, accepted.placement.prefill)
        if index is None:
            return None
        self.mirror.release(accepted)
        accepted.placement = dataclasses.replace(accepted.placement, decode=index)
        self.mirror.reserve(accepted)
        return accepted.placement

    def forget(self, request: Request) -> None:
        """A request was lost with its instance; nothing is learned from it. Schedule it again."""
        accepted = self._accepted[request.id]
        self._drop(accepted)
        self._lost[request.id] = accepted.number
        if accepted.decode_start_s is None:
            self.occupancy.drop(accepted.prefill_end_s)
        else:
            self.occupancy.leave(accepted.decode_start_s)

    def assignment(self, request_id: str) -> Assignment:
        """What was decided on an accepted request that has not ended. Raises KeyError for any other."""
        return self._accepted[request_id]

    def _drop(self, accepted: Assignment) -> None:
        del self._accepted[accepted.request.id]
        self.mirror.release(accepted)


def _decoding(decode: DecodeMirror) -> list[tuple[float, float]]:
    """(start, predicted output tokens) of the requests that an instance decodes, in the order of their starts."""
    assigned = decode.requests.values()
    return [(a.decode_start_s, a.output_tokens) for a in assigned if a.decode_start_s is not None]
