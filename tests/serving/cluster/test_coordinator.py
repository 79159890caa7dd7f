"""The life of a request, with instances that do nothing by themselves: what is asked of them, and what events do."""

import pytest

from serving.cluster.request_state import Phase
from serving.conductor import SLO, RoleConfig
from serving.request import Request
from serving.workload.outcomes import COMPLETED, FAILED, REJECTED
from tests.serving.cluster.fake_cluster import Cluster
from tests.serving.conductor.mirrors import COSTS


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
