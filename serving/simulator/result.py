"""What a simulation produced."""

import dataclasses
from collections.abc import Mapping, Sequence

from serving.workload.outcomes import RequestOutcome


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulationResult:
    """What a run produced.

    Attributes:
        outcomes: of every request, in order of arrival.
        prefill_s: device seconds of all prefills; `wasted_prefill_s` of those whose requests then were refused or lost.
        hits_by_tier: reused tokens by where they were, of the prefills that gave first tokens.
        rejections: counts by reason.
        errors: of the Conductor's estimates.
        events: how many the simulator handled.
        switches: nodes that changed their role.
        reruns: requests placed again because a node died; those that had tokens go on from there.
        node_hours: of the nodes that were up, from the first arrival to the last end.
    """

    outcomes: Sequence[RequestOutcome]
    prefill_s: float
    wasted_prefill_s: float
    hits_by_tier: Mapping[str, int]
    rejections: Mapping[str, int]
    errors: Mapping[str, float]
    events: int
    switches: int
    reruns: int
    node_hours: float
