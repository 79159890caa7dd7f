"""What a workload is: requests with arrivals, lengths and shared prefixes, wherever they came from."""

import dataclasses

from serving.request import TraceRequest


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        name: where they came from.
        requests: at least one, `arrival_s` never decreasing. An id is the request's position in its source, in
            decimal. `keys` are of the prompt's blocks, the partial last one included; empty where the trace says
            nothing about content.
        block_size: tokens per block of `keys`.
        notes: what reading changed or left out, in words.
    """

    name: str
    requests: tuple[TraceRequest, ...]
    block_size: int = 512
    notes: tuple[str, ...] = ()

    @property
    def duration_s(self) -> float:
        """Seconds from the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s
