"""What a Coordinator asks of an instance, and what it hears from one.

Calls return at once; whatever comes of them is an event, which may come during the call (a simulated instance) or much
later (a process). An instance is known by its name and epoch, which grows with each restart: transports drop events of
an earlier epoch. Events of a request name the attempt that they belong to, so that late ones are recognised.
"""

import dataclasses
from collections.abc import Hashable, Sequence
from typing import Protocol

from serving.cluster.gaps import Progression
from serving.conductor import Placement, PrefillReport
from serving.request import Request


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What an instance is asked to do.

    Attributes:
        request: the request, or what is left of it.
        placement: what the Conductor decided.
        number: place in the order of arrival, which orders requests whose queue keys are equal.
        attempt: counts placements and transfers of this request.
    """

    request: Request
    placement: Placement
    number: int
    attempt: int


class Instance(Protocol):
    """One engine, node or group of nodes.

    Attributes:
        name: unique in the cluster.
        epoch: how often it was started.
    """

    name: str
    epoch: int

    def prefill(self, task: Task, now: float) -> None:
        """Computes a prompt, with the KV that its placement reuses: `Events.began`, then `prefilled`."""
        ...

    def hand_over(self, task: Task, now: float) -> None:
        """Sends all KV of a computed prompt to the decode instance of its placement: `arrived`."""
        ...

    def decode(self, task: Task, now: float) -> None:
        """Generates the rest of a request whose KV is there: `tokens` now and then, `finished` at the end."""
        ...

    def abort(self, request_id: str, now: float) -> None:
        """Drops a request that waits or runs here: `stopped` where its prefill had begun."""
        ...

    def switch(self, now: float) -> None:
        """Leaves its role, in which nothing is left to do, and the KV that it keeps for reuse: `switched`."""
        ...


class Events(Protocol):
    """What instances report; a `Coordinator` hears it. `prefill` and `decode` are indices in the pools."""

    def began(self, prefill: int, request_id: str | None, free_s: float) -> None:
        """The instance computes this prompt (`None`: nothing), and expects to begin the next one at `free_s`."""
        ...

    def prefilled(self, request_id: str, attempt: int, report: PrefillReport, now: float) -> None:
        """A prompt is computed and the first token is there."""
        ...

    def stopped(self, request_id: str, compute_s: float) -> None:
        """A prefill was given up after so much device time."""
        ...

    def arrived(self, request_id: str, attempt: int, now: float) -> None:
        """All KV of a request is on its decode instance."""
        ...

    def tokens(self, request_id: str, gaps: Sequence[Progression], last_s: float) -> None:
        """Tokens that came since the last report, the last one at `last_s`."""
        ...

    def finished(self, request_id: str, attempt: int, gaps: Sequence[Progression], now: float) -> None:
        """The last token came; `gaps` are those that were not reported yet."""
        ...

    def loaded(self, decode: int, present_tokens: int) -> None:
        """KV tokens on a decode instance."""
        ...

    def observe_iterations(self, batch: int, tokens: float, seconds: float) -> None:
        """An iteration of a decode batch, or means over several."""
        ...

    def moved(self, holder: int, demoted: Sequence[Hashable], lost: Sequence[Hashable]) -> None:
        """A holder moved blocks to its slow tier, and then lost some."""
        ...

    def joined(self, name: str, now: float) -> None:
        """An instance has started; its caches are empty."""
        ...

    def lost(self, name: str, now: float) -> None:
        """An instance has died: a missed heartbeat, or its process is gone."""
        ...

    def switched(self, name: str, now: float) -> None:
        """An instance is ready for its other role."""
        ...
