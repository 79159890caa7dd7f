"""Instances that change their roles: one at a time, once nothing is left on it."""

from collections.abc import Mapping, Sequence

from serving.cluster.instance import Instance
from serving.cluster.request_state import Phase, RequestState
from serving.conductor import Conductor
from serving.conductor.roles import DECODE, PREFILL


class RoleChanges:
    """Carries out one role change at a time: drains the instance, lets it switch, and has it serve in the other pool.

    Attributes:
        roles: by instance.
        count: changes that were made.
    """

    def __init__(
        self,
        conductor: Conductor,
        instances: Sequence[Instance],
        roles: list[str],
        states: Mapping[str, RequestState],
    ) -> None:
        """`states` are all placed requests."""
        self.roles = roles
        self.count = 0
        self._conductor, self._mirror, self._instances, self._states = conductor, conductor.mirror, instances, states
        # The instance that leaves its role, and whether work is left on it.
        self._leaving: int | None = None
        self._draining = False

    def ask(self, now: float) -> None:
        """Lets the Conductor name an instance."""
        change = self._conductor.rebalance(now)
        if change is not None:
            self._leaving = change.index if change.role == PREFILL else self._mirror.decode[change.index].link
            self._draining = True
        self.drain(now)

    def drain(self, now: float) -> None:
        """Has the instance switch if nothing is left on it; its KVCache does not go with it."""
        number = self._leaving
        if number is None or not self._draining or not self._idle(number, now):
            return
        self._draining = False
        if self.roles[number] == PREFILL:
            self._mirror.forget_blocks(number)
        self.roles[number] = PREFILL if self.roles[number] == DECODE else DECODE
        self._instances[number].switch(now)

    def died(self, number: int, now: float) -> None:
        """An instance has died; if it was this one, that ends its change."""
        if number == self._leaving:
            self._leaving = None
            self._conductor.rebalanced(now)

    def switched(self, now: float) -> None:
        """The instance is ready for its other role."""
        self._leaving = None
        self.count += 1
        self._conductor.rebalanced(now)

    def _idle(self, number: int, now: float) -> bool:
        if self.roles[number] == DECODE:
            return not any(decode.link == number and decode.requests for decode in self._mirror.decode)
        # Its KV may still be on its way, to decode instances or to others that reuse it.
        return not any(
            (state.task is not None and state.task.placement.prefill == number and state.phase is not Phase.DECODE)
            or fetches_from(self._conductor, state, number, now)
            for state in self._states.values()
        )


def fetches_from(conductor: Conductor, state: RequestState, source: int, now: float) -> bool:
    """Whether a prefill waits for KV that is on its way from holder `source`."""
    return (
        state.phase is Phase.PREFILL
        and state.task is not None
        and state.task.placement.source == source
        and conductor.assignment(state.request.id).fetch_end_s > now
    )
