"""A Coordinator over instances that do nothing by themselves: they note what is asked of them."""

import dataclasses

from serving.cluster.coordinator import Coordinator
from serving.cluster.instance import Task
from serving.cluster.request_state import RequestState
from serving.conductor import Conductor, ConductorConfig, PrefillReport
from serving.conductor.mirror import PrefillMirror
from serving.conductor.roles import DECODE, PREFILL
from serving.request import Request
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
