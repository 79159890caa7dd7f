"""The life of a request in a cluster: arrive, be placed, prefill, hand over, decode; be lost and run again.

The Coordinator asks the Conductor where a request goes, asks instances to do it, and hears what comes of it. It reads
no clock: every call and event carries `now`. Live and simulated clusters differ in their instances only.
"""

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from serving.cluster.gaps import Progression
from serving.cluster.instance import Instance, Task
from serving.cluster.request_state import Phase, RequestState
from serving.cluster.role_changes import RoleChanges, fetches_from
from serving.conductor import Conductor, Placement, PrefillReport, Rejection
from serving.conductor.roles import DECODE, PREFILL
from serving.request import Request
from serving.workload.outcomes import COMPLETED, FAILED, REJECTED

# (request, tokens that it has generated, tokens per block, now) -> what is left of the request
Remainder = Callable[[Request, int, int, float], Request]


class Listener(Protocol):
    """Whoever a Coordinator tells what becomes of requests."""

    def prefilled(self, state: RequestState, report: PrefillReport, now: float) -> None:
        """A first token came."""
        ...

    def rerun(self, state: RequestState, now: float) -> None:
        """An attempt was lost with an instance; the request is scheduled again."""
        ...

    def ended(self, state: RequestState, outcome: str, now: float) -> None:
        """A request ended; `state.phase` tells where."""
        ...


class Coordinator:
    """Implements `Events`.

    Attributes:
        conductor: who decides.
        changes: role changes.
    """

    def __init__(self, conductor: Conductor, listener: Listener, remainder: Remainder) -> None:
        """`remainder` makes what is left of a request that lost its KV after some tokens."""
        self.conductor = conductor
        self._mirror = conductor.mirror
        self._listener, self._remainder = listener, remainder
        self._instances: list[Instance] = []
        self._numbers: dict[str, int] = {}
        self._decode_index: dict[int, int] = {decode.link: decode.index for decode in self._mirror.decode}
        # Placed requests in the order of their placements, and those that wait at the Conductor.
        self._states: dict[str, RequestState] = {}
        self._deferred: dict[str, RequestState] = {}
        self._arrivals = 0
        self._roles: list[str] = []
        self.changes = RoleChanges(conductor, self._instances, self._roles, self._states)

    def add(self, instance: Instance, role: str) -> None:
        """Registers the next instance by its index in the mirror; it serves once it has `joined`."""
        self._numbers[instance.name] = len(self._instances)
        self._instances.append(instance)
        self._roles.append(role)

    @property
    def busy(self) -> bool:
        """Whether a placed request has not ended."""
        return bool(self._states)

    # -- requests

    def arrive(self, request: Request, now: float) -> None:
        """Takes a new request."""
        state = RequestState(number=self._arrivals, arrived=request, request=request)
        self._arrivals += 1
        self._schedule(state, now)

    def rebalance(self, now: float) -> None:
        """Asks the Conductor whether an instance is to change its role. Call it now and then."""
        self.changes.ask(now)

    def drain(self, now: float) -> None:
        """Refuses all requests that wait at the Conductor: nothing will come that could release them."""
        for request in self.conductor.drain():
            self._end(self._deferred.pop(request.id), REJECTED, now)

    def _schedule(self, state: RequestState, now: float) -> None:
        decision = self.conductor.schedule(state.request, now)
        if isinstance(decision, Placement):
            self._launch(state, decision, now)
        elif isinstance(decision, Rejection):
            self._end(state, REJECTED, now)
        else:
            self._deferred[state.request.id] = state

    def _release(self, now: float) -> None:
        """Launches deferred requests one by one, so that each decision sees the one before it."""
        while self.conductor.deferred:
            decided = self.conductor.release(now)
            if decided is None:
                return
            request, decision = decided
            state = self._deferred.pop(request.id)
            if isinstance(decision, Rejection):
                self._end(state, REJECTED, now)
            else:
                self._launch(state, decision, now)

    def _launch(self, state: RequestState, placement: Placement, now: float) -> None:
        request = state.request
        state.task = Task(request=request, placement=placement, number=state.number, attempt=state.attempt)
        state.phase = Phase.PREFILL
        self._states[request.id] = state
        self._instances[placement.prefill].prefill(state.task, now)
        self._mirror.rank(placement.prefill)

    def _end(self, state: RequestState, outcome: str, now: float) -> None:
        self._states.pop(state.request.id, None)
        if state.resumed is not None and outcome == REJECTED:
            # Its user has seen tokens: that is no clean refusal.
            outcome = FAILED
        self._listener.ended(state, outcome, now)
        state.phase = Phase.ENDED
        self.changes.drain(now)

    def _current(self, request_id: str, attempt: int, phase: Phase) -> RequestState | None:
        """The request that an event is of; `None` where the event is of an earlier attempt or a request that ended."""
        state = self._states.get(request_id)
        return state if state is not None and state.attempt == attempt and state.phase is phase else None

    # -- events of requests

    def began(self, prefill: int, request_id: str | None, free_s: float) -> None:
        self._mirror.prefill[prefill].began(request_id, free_s)

    def prefilled(self, request_id: str, attempt: int, report: PrefillReport, now: float) -> None:
        state = self._current(request_id, attempt, Phase.PREFILL)
        if state is None or state.task is None:
            return
        assignment = self.conductor.assignment(request_id)
        instance = self._instances[state.task.placement.prefill]
        state.started_s, state.compute_s = report.started_s, report.compute_s
        state.hit_tokens = report.reused_tokens
        state.first_token(now)
        self._listener.prefilled(state, report, now)
        refused = self.conductor.prefill_done(state.request, report, now)
        if refused is not None:
            instance.abort(request_id, now)
            self._end(state, REJECTED, now)
        elif not report.decodes:
            state.finish()
            self._end(state, COMPLETED, now)
        elif self._mirror.coupled:
            self._decode(state, now)
        else:
            state.phase = Phase.TRANSFER
            self._mirror.hand_over(assignment, report.started_s, now)
            instance.hand_over(state.task, now)
        # Behind what decode waits for.
        self._mirror.write_through(assignment, now)

    def stopped(self, request_id: str, compute_s: float) -> None:
        self._states[request_id].compute_s = compute_s

    def arrived(self, request_id: str, attempt: int, now: float) -> None:
        state = self._current(request_id, attempt, Phase.TRANSFER)
        if state is not None:
            self._decode(state, now)
            self.changes.drain(now)

    def _decode(self, state: RequestState, now: float) -> None:
        task = state.task
        assert task is not None
        state.phase = Phase.DECODE
        self._mirror.arrived(self.conductor.assignment(state.request.id))
        self._instances[self._mirror.decode[task.placement.decode].link].decode(task, now)

    def tokens(self, request_id: str, gaps: Sequence[Progression], last_s: float) -> None:
        self._states[request_id].more_tokens(gaps, last_s)

    def finished(self, request_id: str, attempt: int, gaps: Sequence[Progression], now: float) -> None:
        state = self._current(request_id, attempt, Phase.DECODE)
        if state is None:
            return
        state.more_tokens(gaps, now)
        tokens = state.finish()
        self.conductor.decode_done(state.request, tokens, state.tbt_s or 0.0, now)
        self._end(state, COMPLETED, now)
        if self.conductor.deferred:
            self._release(now)

    # -- events of instances

    def loaded(self, decode: int, present_tokens: int) -> None:
        self._mirror.decode[decode].present_tokens = present_tokens

    def observe_iterations(self, batch: int, tokens: float, seconds: float) -> None:
        self.conductor.observe_iterations(batch, tokens, seconds)

    def moved(self, holder: int, demoted: Sequence[Hashable], lost: Sequence[Hashable]) -> None:
        self._mirror.moved(holder, demoted, lost)

    def joined(self, name: str, now: float) -> None:
        self._serve(self._numbers[name], now)
        self._release(now)

    def switched(self, name: str, now: float) -> None:
        self.changes.switched(now)
        self._serve(self._numbers[name], now)
        self._release(now)

    def lost(self, name: str, now: float) -> None:
        """Requests that lose by it are scheduled again, with the tokens that they have got."""
        number = self._numbers[name]
        prefills, decodes = self._serves(number, PREFILL), self._serves(number, DECODE)
        if prefills:
            self._mirror.lose_prefill(number, now)
        if decodes:
            self._mirror.lose_decode(self._decode_index[number])
        self.changes.died(number, now)
        lost = self._cut_off(number, now) if prefills else []
        if decodes:
            lost += self._without_decode(self._decode_index[number], now)
        for state in sorted(lost, key=lambda state: state.number):
            self._rerun(state, now)

    def _serves(self, number: int, role: str) -> bool:
        return self._mirror.coupled or self._roles[number] == role

    def _serve(self, number: int, now: float) -> None:
        """Gives an instance its place in the pool of its role."""
        if self._serves(number, PREFILL):
            self._mirror.serve_prefill(number, now)
        if self._serves(number, DECODE):
            self._mirror.serve_decode(self._decode_index[number])

    # -- requests that lose by an instance

    def _cut_off(self, prefill: int, now: float) -> list[RequestState]:
        """Requests in a prefill instance that died, and those whose KV was on its way from there."""
        lost = []
        for state in self._states.values():
            if fetches_from(self.conductor, state, prefill, now):
                self._withdraw(state, now)
                lost.append(state)
            elif state.phase is not Phase.DECODE and state.task and state.task.placement.prefill == prefill:
                lost.append(state)
        return lost

    def _without_decode(self, decode: int, now: float) -> list[RequestState]:
        """Requests in a decode instance that died, and those on their way there for which there is no other."""
        assigned = self._mirror.decode[decode].requests
        stranded, lost = [], []
        for state in [state for name, state in self._states.items() if name in assigned]:
            if state.phase is Phase.DECODE:
                lost.append(state)
            elif self._mirror.coupled:
                # Its prefill was here too.
                continue
            elif (placement := self.conductor.redirect(state.request)) is None:
                stranded.append(state)
            else:
                self._redirect(state, placement, now)
        for state in stranded:
            if state.phase is Phase.PREFILL:
                self._withdraw(state, now)
        return lost + stranded

    def _redirect(self, state: RequestState, placement: Placement, now: float) -> None:
        """Gives a request another decode instance; KV that was sent already is sent again, there."""
        assert state.task is not None
        if state.phase is Phase.TRANSFER:
            state.attempt += 1
        state.task = dataclasses.replace(state.task, placement=placement, attempt=state.attempt)
        if state.phase is Phase.TRANSFER:
            self._mirror.hand_over(self.conductor.assignment(state.request.id), now, now)
            self._instances[placement.prefill].hand_over(state.task, now)

    def _withdraw(self, state: RequestState, now: float) -> None:
        """Takes an unfinished prefill back from an instance."""
        assert state.task is not None
        prefill = state.task.placement.prefill
        self._mirror.prefill[prefill].withdraw(state.request.id)
        self._instances[prefill].abort(state.request.id, now)
        self._mirror.rank(prefill)

    def _rerun(self, state: RequestState, now: float) -> None:
        """Schedules a request again that lost its KV."""
        self.conductor.forget(state.request)
        del self._states[state.request.id]
        self._listener.rerun(state, now)
        state.remember()
        request, resumed = state.request, state.resumed
        if resumed is not None:
            request = self._remainder(state.arrived, resumed.tokens, self._mirror.block_size, now)
        again = RequestState(
            number=state.number,
            arrived=state.arrived,
            request=request,
            attempt=state.attempt + 1,
            resumed=resumed,
        )
        self._schedule(again, now)
