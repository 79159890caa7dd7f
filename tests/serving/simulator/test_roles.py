"""Nodes that change between prefill and decode: it helps where the load changes, and nothing is lost by it."""

import random

import pytest

from serving.conductor import ConductorConfig, RoleConfig
from serving.simulator.config import ClusterConfig
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import mooncake_a800
from serving.simulator.recorder import Recorder
from serving.simulator.result import SimulationResult
from serving.simulator.simulation import Simulation
from serving.workload.outcomes import totals
from serving.workload.requests import Trace
from serving.workload.synthetic import Lengths, LoadPhase, phased

ROLES = ConductorConfig(roles=RoleConfig())


def phases(seed: int, *lengths: tuple[float, float, int, int]) -> Trace:
    """Phases of (seconds, rate, input tokens, output tokens)."""
    return phased(
        [LoadPhase(s, rate, Lengths(tokens), Lengths(output)) for s, rate, tokens, output in lengths], seed=seed
    )


def simulate(trace: Trace, prefill: int, decode: int, roles: bool) -> SimulationResult:
    conductor = ROLES if roles else ConductorConfig()
    return Simulation(ClusterConfig(prefill=prefill, decode=decode, conductor=conductor), mooncake_a800()).run(trace)


def effective(result: SimulationResult) -> float:
    return totals(result.outcomes, 30.0, 0.1)["effective_ratio"]


# Long prompts with short answers, and the reverse: 4 or more of 8 nodes must prefill, then 5 or more decode.
LONG, SHORT = (3.0, 10_000, 20), (3.0, 500, 400)


def test_a_load_that_shifts_is_followed_better_than_by_any_fixed_split() -> None:
    trace = phases(0, (600.0, *LONG), (600.0, *SHORT))
    recorder = Recorder(interval_s=60.0)
    followed = Simulation(ClusterConfig(prefill=4, decode=4, conductor=ROLES), mooncake_a800(), recorder).run(trace)
    assert followed.switches >= 3
    prefill = [sample.prefill_instances for sample in recorder.samples]
    assert max(prefill) > 4 > prefill[-1]
    assert all(outcome.outcome == "completed" for outcome in followed.outcomes)
    fixed = [effective(simulate(trace, prefill, 8 - prefill, roles=False)) for prefill in (3, 4, 5)]
    assert effective(followed) > max(fixed) + 0.1


def test_a_load_that_shifts_faster_than_it_is_followed_is_a_loss() -> None:
    """Every burst is over before a node could help: those that change are then missing where the next burst is."""
    trace = phases(1, *[(60.0, *LONG), (60.0, *SHORT)] * 10)
    followed = simulate(trace, 3, 5, roles=True)
    assert followed.switches > 0
    assert effective(followed) < effective(simulate(trace, 3, 5, roles=False))


def test_a_steady_load_that_fits_moves_nothing() -> None:
    result = simulate(phases(2, (600.0, 3.0, 4000, 150)), 4, 4, roles=True)
    assert result.switches == 0


def test_without_switches_roles_change_nothing() -> None:
    trace = phases(2, (200.0, 3.0, 4000, 150))
    followed, fixed = simulate(trace, 4, 4, roles=True), simulate(trace, 4, 4, roles=False)
    assert followed.outcomes == fixed.outcomes


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_left_behind_while_nodes_change_and_die(seed: int) -> None:
    rng = random.Random(seed)
    trace = phases(seed, *((rng.uniform(40, 90), 5.0, *rng.choice([(9000, 10), (400, 300)])) for _ in range(5)))
    events = [(rng.uniform(0, 300), rng.randrange(8)) for _ in range(24)]
    config = ClusterConfig(
        prefill=4,
        decode=4,
        conductor=ConductorConfig(
            roles=RoleConfig(looks=1, cooldown_s=0.0), admission=rng.choice(["none", "deferred"])
        ),
        failures=tuple(events[:12]),
        joins=tuple(events[12:]),
    )
    simulation = Simulation(config, mooncake_a800())
    result = simulation.run(trace)
    assert result == Simulation(config, mooncake_a800()).run(trace)
    assert [outcome.id for outcome in result.outcomes] == [request.id for request in trace.requests]
    for node in simulation.mirror.decode:
        assert (node.assigned, node.assigned_tokens, node.present) == (0, 0, 0)
    assert simulation.conductor.occupancy.running == 0
    # A node has at most one role.
    roles = [
        *(i for _, i in simulation.mirror.prefill_order),
        *(i + 4 if i < 4 else i - 4 for _, i in simulation.mirror.decode_order),
    ]
    assert len(roles) == len(set(roles))


def test_coupled_nodes_have_no_roles() -> None:
    with pytest.raises(SimulatorError, match="no roles to change"):
        ClusterConfig(prefill=0, decode=0, coupled=2, conductor=ROLES)
    with pytest.raises(SimulatorError, match="at least 0 s"):
        ClusterConfig(prefill=1, decode=1, switch_s=-1.0)
