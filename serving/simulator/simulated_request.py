"""What one attempt to serve a request takes on simulated instances."""

import dataclasses

from serving.cluster.instance import Task
from serving.conductor import Placement
from serving.request import TraceRequest


@dataclasses.dataclass(slots=True, kw_only=True)
class SimulatedRequest:
    """Facts about one attempt; times in seconds of the simulation.

    Attributes:
        request, placement, number, attempt: as in its `Task`.
        fetched_s: when KV fetched from another holder is here; `None` where none is.
        reused_tokens: prompt tokens whose KV is not computed: those of the placement, or what an engine found.
        ssd_tokens: reused tokens that the prefill instance must read from SSD.
        started_s: when its prefill began.
        prefill_s: execution of its prefill, waiting for KV to load included.
        compute_s: device time of its prefill.
        sent: whether its KV was handed over once.
        first_token_s: when the prefill ended; `None` until then.
        first_gap_s: from the first token to the second.
        log_start: first entry of the batch's log that it saw.
    """

    request: TraceRequest
    placement: Placement
    number: int
    attempt: int
    fetched_s: float | None = None
    reused_tokens: int = 0
    ssd_tokens: int = 0
    started_s: float = 0.0
    prefill_s: float = 0.0
    compute_s: float = 0.0
    sent: bool = False
    first_token_s: float | None = None
    first_gap_s: float = 0.0
    log_start: int = 0

    @classmethod
    def of(cls, task: Task) -> "SimulatedRequest":
        """Raises TypeError for a request whose output length is not known."""
        if not isinstance(task.request, TraceRequest):
            raise TypeError(f"Request {task.request.id} has no `output_tokens`; simulate TraceRequests.")
        return cls(
            request=task.request,
            placement=task.placement,
            number=task.number,
            attempt=task.attempt,
            reused_tokens=task.placement.reused_tokens,
        )
