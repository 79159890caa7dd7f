"""A request on its way through the simulated cluster."""

import dataclasses

from serving.conductor import Placement
from serving.workload.requests import TraceRequest


@dataclasses.dataclass(slots=True)
class Flight:
    """Mutable state of one request; times in seconds of the simulation.

    Attributes:
        pulled_s: when KV pulled from another node is here.
        ssd_tokens: reused tokens that the prefill node must read from SSD.
        prefill_s: execution of its prefill, waiting for KV to load included.
        compute_s: device time of its prefill.
        first_gap_s: from the first token to the second.
        tbt_s: mean of its longest tenth of gaps, once it ended.
        log_start: first entry of the batch's log that it saw.
    """

    request: TraceRequest
    placement: Placement
    pulled_s: float = 0.0
    ssd_tokens: int = 0
    started_s: float = 0.0
    prefill_s: float = 0.0
    compute_s: float = 0.0
    first_token_s: float = 0.0
    first_gap_s: float = 0.0
    log_start: int = 0
    tbt_s: float | None = None
