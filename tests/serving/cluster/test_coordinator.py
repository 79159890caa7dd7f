"""The life of a request, with instances that do nothing by themselves: what is asked of them, and what events do."""

import dataclasses

import pytest

from serving.cluster.coordinator import Coordinator
from serving.cluster.instance import Task
from serving.cluster.request_state import Phase, RequestState
from serving.conductor import SLO, Conductor, ConductorConfig, PrefillReport, RoleConfig
from serving.conductor.mirror import PrefillMirror
from serving.conductor.roles import DECODE, PREFILL
from serving.request import Request
from serving.workload.outcomes import COMPLETED, FAILED, REJECTED
from tests.serving.conductor.mirrors import COSTS, mirror_of


class FakeInstance:
    """Notes what is asked of it."""

    def __init__(self, name: str) -> None:
        self.name, self.epoch = name, 0
        self.asked: list[tuple[str, str]] = []
        self.tasks: list[Task] = []

    def prefill(self, task: Task, now: float) -> None:
        self._ask("prefill", task)

    def hand_over(self, task: Task, now: float) -> None:
        self._ask("hand over", task)

    def decode(self, task: Task, now: float) -> None:
        self._ask("decode", task)

    def abort(self, request_id: str, now: float) -> None:
        self.asked.append(("abort", request_id))

    def switch(self, now: float) -> None:
        self.asked.append(("switch", ""))

    def _ask(self, what: str, task: Task) -> None:
        self.asked.append((what, task.request.id))
        self.tasks.append(task)


class Ended:
    """A listener."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        self.states: dict[str, RequestState] = {}
        self.reruns: list[str] = []

    def prefilled(self, state: RequestState, report: PrefillReport, now: float) -> None:
        self.states[state.request.id] = state

    def rerun(self, state: RequestState, now: float) -> None:
        self.reruns.append(state.request.id)

    def ended(self, state: RequestState, outcome: str, now: float) -> None:
        assert state.request.id not in self.outcomes
        self.outcomes[state.request.id], self.states[state.request.id] = outcome, state


def remainder(request: Request, tokens: int, block_size: int, now: float) -> Request:
    return dataclasses.replace(request, arrival_s=now, input_tokens=request.input_tokens + tokens)


class Cluster:
    """A Coordinator of fake instances p0, p1, ... and d0, d1, ..."""

    def __init__(self, prefill: int = 2, decode: int = 2, **conductor) -> None:
        self.mirror = mirror_of([0.0] * prefill, [0] * decode)
        # Places in the prefill pool for decode instances that change their roles.
        self.mirror.prefill += [PrefillMirror(name=f"p{i}", index=i) for i in range(prefill, prefill + decode)]
        self.listener = Ended()
        self.conductor = Conductor(ConductorConfig(**conductor), self.mirror, COSTS)
        self.coordinator = Coordinator(self.conductor, self.listener, remainder)
        names = [*(f"p{i}" for i in range(prefill)), *(f"d{i}" for i in range(decode))]
        self.instances = {name: FakeInstance(name) for name in names}
        for name, instance in self.instances.items():
            self.coordinator.add(instance, PREFILL if name.startswith("p") else DECODE)
            self.coordinator.joined(name, 0.0)

    def arrive(self, name: str, now: float = 0.0, tokens: int = 1000) -> Task:
        """The task that an instance was given to prefill."""
        self.coordinator.arrive(Request(id=name, arrival_s=now, input_tokens=tokens, keys=(name,)), now)
        return self.task(name)

    def task(self, name: str) -> Task:
        """The latest."""
        return max(
            (task for i in self.instances.values() for task in i.tasks if task.request.id == name),
            key=lambda task: task.attempt,
        )

    def prefilled(self, task: Task, now: float, decodes: bool = True) -> None:
        report = PrefillReport(
            started_s=now - 0.5, fetched_s=None, execution_s=0.5, compute_s=0.5, reused_tokens=0, decodes=decodes
        )
        self.coordinator.prefilled(task.request.id, task.attempt, report, now)

    def arrived(self, task: Task, now: float) -> None:
        self.coordinator.arrived(task.request.id, task.attempt, now)

    def finished(self, task: Task, now: float, gap_s: float = 0.05) -> None:
        self.coordinator.finished(task.request.id, task.attempt, [(gap_s, 0.0, 10)], now)

    def prefill_of(self, task: Task) -> FakeInstance:
        return self.instances[f"p{task.placement.prefill}"]

    def decode_of(self, task: Task) -> FakeInstance:
        return self.instances[f"d{task.placement.decode}"]

    def assert_empty(self) -> None:
        assert not self.coordinator.busy
        assert self.conductor.in_flight == self.conductor.deferred == self.conductor.occupancy.running == 0
        for decode in self.mirror.decode:
            assert (decode.assigned, decode.assigned_tokens, decode.present) == (0, 0, 0)


def test_a_request_is_prefilled_handed_over_and_decoded() -> None:
    cluster = Cluster()
    task = cluster.arrive("a")
    assert cluster.prefill_of(task).asked == [("prefill", "a")]
    cluster.prefilled(task, 1.0)
    assert cluster.prefill_of(task).asked[1:] == [("hand over", "a")]
    assert not cluster.decode_of(task).asked
    cluster.arrived(task, 1.1)
    assert cluster.decode_of(task).asked == [("decode", "a")]
    assert cluster.mirror.decode[task.placement.decode].present == 1
    cluster.finished(task, 1.7, gap_s=0.06)
    assert cluster.listener.outcomes == {"a": COMPLETED}
    state = cluster.listener.states["a"]
    assert (state.phase, state.tokens, state.first_token_s) == (Phase.ENDED, 11, 1.0)
    assert state.tbt_s == pytest.approx(0.06)
    cluster.assert_empty()


def test_a_request_of_one_token_ends_with_its_prefill() -> None:
    cluster = Cluster()
    cluster.prefilled(cluster.arrive("a"), 1.0, decodes=False)
    assert cluster.listener.outcomes == {"a": COMPLETED}
    assert cluster.listener.states["a"].tbt_s is None
    cluster.assert_empty()


def test_a_request_that_is_refused_after_its_prefill_is_aborted_there() -> None:
    cluster = Cluster(decode=1, admission="baseline", slo=SLO(30.0, COSTS.decode_s(1, 1500)))
    first, second = cluster.arrive("a"), cluster.arrive("b")
    cluster.prefilled(first, 1.0)
    cluster.arrived(first, 1.1)
    cluster.coordinator.loaded(0, 1000)
    cluster.prefilled(second, 1.2)
    assert cluster.prefill_of(second).asked[-1] == ("abort", "b")
    assert cluster.listener.outcomes == {"b": REJECTED}


def test_late_events_are_those_of_an_earlier_attempt() -> None:
    cluster = Cluster(prefill=2, decode=1)
    task = cluster.arrive("a")
    cluster.coordinator.lost(cluster.prefill_of(task).name, 0.5)
    again = cluster.task("a")
    assert (again.attempt, again.placement.prefill) == (task.attempt + 1, 1 - task.placement.prefill)
    cluster.prefilled(task, 1.0)
    cluster.arrived(task, 1.0)
    cluster.finished(task, 1.0)
    assert not cluster.listener.outcomes
    assert not cluster.decode_of(task).asked
    cluster.prefilled(again, 2.0)
    cluster.arrived(again, 2.1)
    cluster.finished(again, 2.7)
    assert (cluster.listener.outcomes, cluster.listener.reruns) == ({"a": COMPLETED}, ["a"])
    cluster.assert_empty()


def test_kv_on_its_way_to_an_instance_that_dies_is_sent_again_elsewhere() -> None:
    cluster = Cluster(prefill=1)
    task = cluster.arrive("a")
    cluster.prefilled(task, 1.0)
    cluster.coordinator.lost(cluster.decode_of(task).name, 1.05)
    again = cluster.task("a")
    assert again.placement.decode == 1 - task.placement.decode
    assert cluster.instances["p0"].asked == [("prefill", "a"), ("hand over", "a"), ("hand over", "a")]
    cluster.arrived(task, 1.1)
    assert not cluster.decode_of(again).asked
    cluster.arrived(again, 1.2)
    cluster.finished(again, 1.8)
    assert (cluster.listener.outcomes, cluster.listener.reruns) == ({"a": COMPLETED}, [])
    cluster.assert_empty()


def test_a_prefill_that_loses_its_decode_instance_goes_on_for_another() -> None:
    cluster = Cluster(prefill=1)
    task = cluster.arrive("a")
    cluster.coordinator.lost(cluster.decode_of(task).name, 0.5)
    cluster.prefilled(task, 1.0)
    cluster.arrived(cluster.instances["p0"].tasks[-1], 1.1)
    assert cluster.instances[f"d{1 - task.placement.decode}"].asked == [("decode", "a")]
    assert not cluster.listener.reruns


def test_a_prefill_without_any_decode_instance_is_given_up() -> None:
    cluster = Cluster(prefill=1, decode=1)
    cluster.arrive("a")
    cluster.coordinator.lost("d0", 0.5)
    assert cluster.instances["p0"].asked[-1] == ("abort", "a")
    assert cluster.listener.outcomes == {"a": REJECTED}
    cluster.assert_empty()


def test_a_request_that_has_tokens_goes_on_from_them() -> None:
    cluster = Cluster()
    task = cluster.arrive("a")
    cluster.prefilled(task, 1.0)
    cluster.arrived(task, 1.1)
    cluster.coordinator.tokens("a", [(0.05, 0.0, 4)], 1.2)
    cluster.coordinator.lost(cluster.decode_of(task).name, 1.3)
    again = cluster.task("a")
    # Five tokens came: they are prompt now, and there are no tokens but those.
    assert (again.request.input_tokens, again.request.arrival_s) == (1005, 1.3)
    cluster.prefilled(again, 2.2)
    cluster.arrived(again, 2.3)
    cluster.coordinator.finished("a", again.attempt, [(0.05, 0.0, 4)], 2.4)
    state = cluster.listener.states["a"]
    assert state.tokens == 10
    # The longest of nine gaps is the one that the failure made.
    assert state.tbt_s == pytest.approx(1.0)
    cluster.assert_empty()


def test_a_request_that_has_tokens_and_finds_no_place_has_failed() -> None:
    cluster = Cluster(decode=1)
    task = cluster.arrive("a")
    cluster.prefilled(task, 1.0)
    cluster.arrived(task, 1.1)
    cluster.coordinator.lost("d0", 1.3)
    assert cluster.listener.outcomes == {"a": FAILED}
    assert cluster.listener.states["a"].tokens == 1
    cluster.assert_empty()


def test_an_instance_that_joins_takes_what_waits() -> None:
    cluster = Cluster(prefill=1, decode=1, admission="deferred", slo=SLO(30.0, COSTS.decode_s(1.4, 1500)))
    first = cluster.arrive("a")
    cluster.prefilled(first, 1.0)
    cluster.arrived(first, 1.0)
    cluster.coordinator.loaded(0, 1000)
    cluster.coordinator.arrive(Request(id="b", arrival_s=1.1, input_tokens=1000), 1.1)
    assert cluster.conductor.deferred == 1
    cluster.finished(first, 2.0)
    assert cluster.task("b").placement.prefill == 0
    assert cluster.conductor.deferred == 0


def changing(decode: int) -> Cluster:
    """A prefill pool of one instance that is overloaded."""
    roles = RoleConfig(looks=1, cooldown_s=0.0)
    cluster = Cluster(prefill=1, decode=decode, roles=roles, slo=SLO(1.0, 0.1))
    cluster.mirror.prefill[0].queued_s = 60.0
    return cluster


def test_an_instance_changes_its_role_once_it_is_empty() -> None:
    cluster = changing(decode=2)
    tasks = [cluster.arrive(name) for name in "ab"]
    cluster.coordinator.rebalance(5.0)
    # Both have a request; the one that is to change gets no more, and finishes its own first.
    (leaving,) = {0, 1} - {index for _, index in cluster.mirror.decode_order}
    (task,) = [task for task in tasks if task.placement.decode == leaving]
    cluster.prefilled(task, 6.0)
    cluster.arrived(task, 6.1)
    assert cluster.decode_of(task).asked == [("decode", task.request.id)]
    cluster.finished(task, 7.0)
    assert cluster.decode_of(task).asked[1:] == [("switch", "")]
    assert cluster.coordinator.changes.count == 0
    cluster.coordinator.switched(f"d{leaving}", 17.0)
    assert cluster.coordinator.changes.count == 1
    assert 1 + leaving in cluster.mirror.prefill_order
    assert cluster.arrive("c", 17.0).placement.prefill == 1 + leaving


def test_an_instance_that_dies_on_its_way_to_another_role_lets_others_change() -> None:
    cluster = changing(decode=3)
    asked = [instance.asked for instance in cluster.instances.values()]
    cluster.coordinator.rebalance(5.0)
    (switching,) = [name for name, instance in cluster.instances.items() if instance.asked]
    cluster.coordinator.rebalance(10.0)
    assert sum(map(len, asked)) == 1
    cluster.coordinator.lost(switching, 11.0)
    cluster.coordinator.rebalance(15.0)
    assert sum(map(len, asked)) == 2
    assert cluster.instances[switching].asked == [("switch", "")]
