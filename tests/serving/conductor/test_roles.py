"""Roles change when one pool is overloaded and the other can spare an instance, and at no other time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.conductor import SLO, ClusterMirror, RoleConfig
from serving.conductor.errors import ConductorError
from serving.conductor.roles import DECODE, PREFILL, RoleChange, RoleController
from tests.serving.conductor.mirrors import COSTS, mirror_of

LIMITS = SLO(30.0, 0.1)
CONFIG = RoleConfig(looks=3, cooldown_s=30.0, window_s=60.0)


def look(
    controller: RoleController, mirror: ClusterMirror, times: int, start_s: float = 0.0
) -> list[RoleChange | None]:
    return [controller.decide(mirror, COSTS, LIMITS, start_s + i) for i in range(times)]


def test_the_least_loaded_decode_instance_is_given_to_an_overloaded_prefill_pool() -> None:
    mirror = mirror_of([60.0, 60.0], [5, 3, 4])
    controller = RoleController(CONFIG)
    assert look(controller, mirror, 4) == [None, None, RoleChange(DECODE, 1), None]
    assert 1 not in mirror.decode_order
    # Nothing more until that is done, nor while the pools rest.
    assert look(controller, mirror, 10, 10.0) == [None] * 10
    controller.switched(20.0)
    assert look(controller, mirror, 30, 20.0) == [None] * 30
    assert look(controller, mirror, 3, 50.0)[-1] == RoleChange(DECODE, 2)


def test_the_least_loaded_prefill_instance_is_given_to_an_overloaded_decode_pool() -> None:
    # 22.5 ms + 20 (4 ms + 34.5 us) is beyond 0.9 of 100 ms.
    mirror = mirror_of([2.0, 1.0, 3.0], [20, 20])
    assert look(RoleController(CONFIG), mirror, 3) == [None, None, RoleChange(PREFILL, 1)]


def test_work_that_was_offered_lately_counts_without_a_queue() -> None:
    controller = RoleController(CONFIG)
    for second in range(600):
        controller.work(1.9, float(second))
    assert controller.utilisation(2, 600.0) == pytest.approx(0.95, rel=0.02)
    assert look(controller, mirror_of([0.0, 0.0], [3, 3]), 3, 600.0)[-1] == RoleChange(DECODE, 0)
    assert controller.utilisation(2, 660.0) == pytest.approx(0.95 / math.e, rel=0.03)


def test_a_pool_that_refusals_show_to_be_short_gets_an_instance() -> None:
    """Admission keeps both pools within their limits, so their loads say nothing."""
    controller, mirror = RoleController(CONFIG), mirror_of([0.0, 0.0], [15, 15])
    for second in range(100):
        controller.arrived(float(second), DECODE if second % 10 == 0 else None)
    assert look(controller, mirror, 3, 100.0)[-1] == RoleChange(PREFILL, 0)
    # The pool that is short itself gives nothing.
    controller, mirror = RoleController(CONFIG), mirror_of([60.0, 60.0], [3, 3])
    for second in range(100):
        controller.arrived(float(second), DECODE if second % 10 == 0 else None)
    assert look(controller, mirror, 9, 100.0) == [None] * 9


def test_no_instance_is_given_that_is_needed_or_the_last() -> None:
    assert look(RoleController(CONFIG), mirror_of([60.0], [17, 17]), 9) == [None] * 9
    assert look(RoleController(CONFIG), mirror_of([60.0], [0]), 9) == [None] * 9
    assert look(RoleController(CONFIG), mirror_of([0.0], [40, 40]), 9) == [None] * 9


@given(st.lists(st.booleans(), max_size=40))
def test_a_load_that_comes_and_goes_moves_nothing_before_enough_looks_agree(overloads: list[bool]) -> None:
    calm, busy = mirror_of([0.0, 0.0], [3, 3]), mirror_of([60.0, 60.0], [3, 3])
    controller = RoleController(CONFIG)
    run = 0
    for now, overload in enumerate(overloads):
        change = controller.decide(busy if overload else calm, COSTS, LIMITS, float(now))
        run = run + 1 if overload else 0
        assert (change is not None) == (run == 3)
        if change is not None:
            return


@given(st.integers(2, 20), st.integers(2, 20), st.floats(0, 60), st.integers(0, 60))
def test_the_pool_that_gave_is_not_the_next_to_ask(prefill: int, decode: int, queue_s: float, batch: int) -> None:
    """Hysteresis: with the same load spread over the pools that result, no instance is called back."""
    mirror = mirror_of([queue_s] * prefill, [batch] * decode)
    changes = look(RoleController(CONFIG), mirror, 3)
    if changes[-1] is None:
        return
    step = 1 if changes[-1].role == DECODE else -1
    spread = math.floor(batch * decode / (decode - step))
    after = mirror_of([queue_s * prefill / (prefill + step)] * (prefill + step), [spread] * (decode - step))
    assert look(RoleController(CONFIG), after, 3)[-1] in (None, RoleChange(changes[-1].role, 0))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConductorError, match="below `high`"):
        RoleConfig(low=0.9, high=0.9)
    with pytest.raises(ConductorError, match="share of the requests"):
        RoleConfig(refused=0.0)
    with pytest.raises(ConductorError, match="first two must be above 0"):
        RoleConfig(interval_s=0.0)
