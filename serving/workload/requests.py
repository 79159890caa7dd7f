"""What a workload is: requests with arrivals, lengths and shared prefixes, wherever they came from."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a workload.

    Attributes:
        id: position in its trace, unique there.
        arrival_s: seconds since the workload's start.
        input_tokens: prompt length, at least 1.
        output_tokens: tokens to generate, at least 1.
        block_ids: ids of the prompt's blocks, the partial last one included; an id stands for a block and all before
            it, so equal ids mean equal prefixes. Empty where the trace says nothing about content.
        tenant: whose request it is.
        priority: lower is served first.
    """

    id: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()
    tenant: str = ""
    priority: int = 0


@dataclasses.dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    Attributes:
        name: where they came from.
        requests: at least one, `arrival_s` never decreasing.
        block_size: tokens per block of `block_ids`.
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
