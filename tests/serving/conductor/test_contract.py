"""What the Conductor promises to whoever calls it, on mirrors built by hand: no cluster, and no simulation."""

import collections
import dataclasses

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.conductor import SLO, Conductor, ConductorConfig, Deferral, Placement, PrefillReport, Rejection
from serving.conductor.admission import ADMISSIONS
from serving.request import Request
from tests.serving.conductor.mirrors import COSTS, SIZE, mirror_of


def request_of(name: str, blocks: int = 4, now: float = 0.0, **fields) -> Request:
    keys = tuple(f"of {name}, {i}" for i in range(blocks))
    return dataclasses.replace(Request(id=name, arrival_s=now, input_tokens=blocks * SIZE, keys=keys), **fields)


def report_at(now: float, decodes: bool = True) -> PrefillReport:
    return PrefillReport(
        started_s=now, fetched_s=None, execution_s=0.0, compute_s=0.0, reused_tokens=0, decodes=decodes
    )


def conductor_of(mirror, **config) -> Conductor:
    return Conductor(ConductorConfig(**config), mirror, COSTS)


def placed(conductor: Conductor, request: Request, now: float = 0.0) -> Placement:
    decision = conductor.schedule(request, now)
    assert isinstance(decision, Placement)
    conductor.mirror.rank(decision.prefill)
    return decision


def refused(conductor: Conductor, request: Request, now: float = 0.0) -> Rejection:
    decision = conductor.schedule(request, now)
    assert isinstance(decision, Rejection)
    return decision


def test_a_request_goes_where_its_prefix_is_unless_the_queue_there_costs_more() -> None:
    asked = request_of("a", blocks=40)
    for queue_s, index in ((0.1, 0), (60.0, 1)):
        mirror = mirror_of([queue_s, 0.0], [0], held=[asked.keys[:39]])
        placement = placed(conductor_of(mirror, placement="cache_aware"), asked)
        assert (placement.prefill, placement.reused_tokens) == (index, 39 * SIZE if index == 0 else 0)


def test_a_prefix_is_fetched_from_a_busy_holder_and_the_links_are_booked() -> None:
    asked = request_of("a", blocks=40)
    mirror = mirror_of([60.0, 0.0], [0], held=[asked.keys[:39]])
    conductor = conductor_of(mirror)
    placement = placed(conductor, asked)
    assert (placement.prefill, placement.source, placement.fetched_tokens) == (1, 0, 39 * SIZE)
    fetch_s = COSTS.transfer_s(39 * SIZE)
    assert mirror.links.wait_s(0, 1, 0.0) == pytest.approx(fetch_s)
    assert conductor.assignment("a").fetch_end_s == pytest.approx(fetch_s)


def test_what_was_placed_is_believed_at_once() -> None:
    conductor = conductor_of(mirror := mirror_of([0.0, 0.0], [0, 0]))
    first, second = placed(conductor, request_of("a")), placed(conductor, request_of("b"))
    assert {first.prefill, second.prefill} == {first.decode, second.decode} == {0, 1}
    # Its blocks count as kept, so the next turn of the same conversation follows it.
    assert placed(conductor, request_of("a2", keys=request_of("a").keys)).reused_tokens == 4 * SIZE - 1
    assert sum(len(prefill.queue) for prefill in mirror.prefill) == 3


def test_a_long_queue_is_refused_for_ttft_by_every_admission_but_none() -> None:
    for admission in ADMISSIONS:
        conductor = conductor_of(mirror_of([60.0], [0]), admission=admission, slo=SLO(30.0, 0.1))
        if admission == "none":
            placed(conductor, request_of("a"))
            continue
        refusal = refused(conductor, request_of("a"))
        assert refusal.reason == "ttft"
        assert refusal.predicted_ttft_s == pytest.approx(60.0 + COSTS.prefill_s(4 * SIZE, 0))
        assert refusal.retry_after_s == pytest.approx(refusal.predicted_ttft_s - 30.0)
        assert conductor.rejections == {"ttft": 1}


@pytest.mark.parametrize("admission", ADMISSIONS)
def test_a_full_batch_is_refused_deferred_or_seen_late(admission: str) -> None:
    """Twenty decode where the limit allows for fifteen."""
    slo = SLO(30.0, COSTS.decode_s(15, 15_000))
    conductor = conductor_of(mirror_of([0.0], [20]), admission=admission, slo=slo)
    decision = conductor.schedule(request := request_of("a"), 0.0)
    if admission in ("none", "baseline", "predicted"):
        # `predicted` knows only requests that it accepted itself.
        assert isinstance(decision, Placement)
        late = conductor.prefill_done(request, report_at(1.0), 1.0)
        assert (late is None) == (admission == "none")
        assert late is None or late.reason == "tbt, after prefill"
    elif admission in ("deferred", "shortest_output"):
        assert isinstance(decision, Deferral)
        assert conductor.deferred == 1
    else:
        assert isinstance(decision, Rejection)
        assert decision.reason == "tbt"


def test_no_room_for_kv_and_no_instance_are_reasons_of_their_own() -> None:
    full = mirror_of([0.0], [3], capacity_tokens=4000)
    assert refused(conductor_of(full), request_of("a")).reason == "kv capacity"
    gone = mirror_of([0.0], [0])
    gone.lose_decode(0)
    assert refused(conductor_of(gone), request_of("a")).reason == "no instance"


def test_a_deferred_request_is_released_once_there_is_room_and_refused_once_it_is_too_late() -> None:
    slo = SLO(30.0, COSTS.decode_s(15, 15_000))
    conductor = conductor_of(mirror := mirror_of([0.0], [20]), admission="deferred", slo=slo)
    for name in "ab":
        assert isinstance(conductor.schedule(request_of(name), 0.0), Deferral)
    assert conductor.release(1.0) is None
    lighter = mirror_of([0.0], [2])
    mirror.decode[0], mirror.decode_order = lighter.decode[0], lighter.decode_order
    released = conductor.release(2.0)
    assert released is not None
    assert released[0].id == "a"
    assert isinstance(released[1], Placement)
    late = conductor.release(31.0)
    assert late is not None
    assert isinstance(late[1], Rejection)
    assert (late[0].id, late[1].reason, conductor.deferred) == ("b", "ttft", 0)


def test_a_redirect_moves_the_reservation_and_finds_no_room_where_there_is_none() -> None:
    conductor = conductor_of(mirror := mirror_of([0.0], [0, 0]))
    request = request_of("a")
    placement = placed(conductor, request)
    mirror.lose_decode(placement.decode)
    again = conductor.redirect(request)
    assert again == dataclasses.replace(placement, decode=1 - placement.decode)
    assert [decode.assigned for decode in mirror.decode] == [again.decode == 0, again.decode == 1]
    mirror.lose_decode(again.decode)
    assert conductor.redirect(request) is None
    conductor.forget(request)
    assert [decode.assigned for decode in mirror.decode] == [0, 0]


def test_competing_tenants_take_turns_whatever_one_of_them_sends() -> None:
    conductor = conductor_of(mirror := mirror_of([0.0], [0]), fair=True)
    for i in range(9):
        placed(conductor, request_of(f"flood {i}", now=0.0, tenant="flood"))
    for i in range(3):
        placed(conductor, request_of(f"light {i}", now=0.1, tenant="light"), 0.1)
    queue = [name.split()[0] for *_, name in mirror.prefill[0].queue]
    assert collections.Counter(queue[:6]) == {"flood": 3, "light": 3}


class Reservations(RuleBasedStateMachine):
    """Whatever happens in whatever order, beliefs are those of the requests that are on their way."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = mirror_of([0.0, 0.0], [0, 0])
        self.conductor = conductor_of(self.mirror, admission="request_level")
        self.prefilling: dict[str, Request] = {}
        self.decoding: dict[str, Request] = {}
        self.now, self.count = 0.0, 0

    @rule(blocks=st.integers(1, 60), wait_s=st.floats(0, 1))
    def arrive(self, blocks: int, wait_s: float) -> None:
        self.now += wait_s
        self.count += 1
        request = request_of(str(self.count), blocks, self.now)
        decision = self.conductor.schedule(request, self.now)
        if isinstance(decision, Placement):
            self.prefilling[request.id] = request
            # The instances here begin at once, and compute everything that they have at the same time.
            self.mirror.prefill[decision.prefill].began(request.id, self.now)
            self.mirror.rank(decision.prefill)

    @precondition(lambda self: self.prefilling)
    @rule(decodes=st.booleans())
    def prefilled(self, decodes: bool) -> None:
        name, request = self.prefilling.popitem()
        refusal = self.conductor.prefill_done(request, report_at(self.now, decodes), self.now)
        if decodes and refusal is None:
            self.decoding[name] = request
            self.mirror.arrived(self.conductor.assignment(name))

    @precondition(lambda self: self.decoding)
    @rule(tokens=st.integers(2, 1000))
    def decoded(self, tokens: int) -> None:
        _, request = self.decoding.popitem()
        self.conductor.decode_done(request, tokens, 0.05, self.now)

    @precondition(lambda self: self.prefilling)
    @rule()
    def redirected(self) -> None:
        self.conductor.redirect(next(iter(self.prefilling.values())))

    @precondition(lambda self: self.prefilling or self.decoding)
    @rule(first=st.booleans())
    def lost(self, first: bool) -> None:
        requests = self.prefilling if self.prefilling and (first or not self.decoding) else self.decoding
        self.conductor.forget(requests.popitem()[1])

    @invariant()
    def reservations_are_those_of_requests_on_their_way(self) -> None:
        held = {**self.prefilling, **self.decoding}
        assert self.conductor.in_flight == len(held)
        assert sorted(name for decode in self.mirror.decode for name in decode.requests) == sorted(held)
        for decode in self.mirror.decode:
            assert decode.assigned_tokens == sum(held[name].input_tokens for name in decode.requests)
            assert decode.present == sum(name in self.decoding for name in decode.requests)
        assert self.conductor.occupancy.running == len(self.decoding)


Reservations.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestReservations = Reservations.TestCase
