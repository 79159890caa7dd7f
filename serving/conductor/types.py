"""What the Conductor is asked, what it sees and what it answers. Live and simulated clusters share these types."""

import dataclasses
from typing import Protocol


class PrefillInstance(Protocol):
    """A prefill (or coupled) instance, live or simulated.

    Attributes:
        name: unique in the cluster.
        index: its bit in the `PrefixIndex` and its place in `ClusterView.prefill`.
    """

    name: str
    index: int

    def queue_s(self, now: float, queue_key: float) -> float:
        """Predicted seconds until a request that sorts at `queue_key` in the queue would start."""
        ...

    def fetch_wait_s(self, now: float, source: int) -> float:
        """Predicted seconds before a fetch of KV from instance `source` could start (congestion of both NICs)."""
        ...


class DecodeInstance(Protocol):
    """A decode (or coupled) instance.

    Attributes:
        name, index: as of a prefill instance, in the decode pool.
        assigned: requests promised to it: in prefill, in transfer, waiting and running.
        assigned_tokens: KV tokens of those, as far as known.
        present: requests whose KV has arrived: waiting and running.
        present_tokens: KV tokens of those.
        kv_capacity_tokens: device memory for KV.
    """

    name: str
    index: int

    @property
    def assigned(self) -> int: ...
    @property
    def assigned_tokens(self) -> int: ...
    @property
    def present(self) -> int: ...
    @property
    def present_tokens(self) -> int: ...
    @property
    def kv_capacity_tokens(self) -> int: ...


@dataclasses.dataclass(frozen=True, slots=True)
class SLO:
    """Limits in seconds that make a request effective."""

    ttft_s: float = 30.0
    tbt_s: float = 0.1


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request runs.

    Attributes:
        prefill, decode: instance indices in their pools.
        reused_tokens: prompt tokens whose KV is not computed again, fetched ones included.
        source: instance to fetch KV from; `None` where only the local cache is used.
        fetched_tokens: how many of `reused_tokens` come from `source`.
        predicted_queue_s: until instance `prefill` is free.
        predicted_fetch_s: until the KV from `source` is there; 0 without one.
        predicted_prefill_s: execution alone.
        predicted_ttft_s: from now: queue, transfer and execution.
        predicted_tbt_s: on the decode instance with this request in its batch.
        queue_key: place in the prefill queue; smaller is earlier.
    """

    prefill: int
    decode: int
    reused_tokens: int
    source: int | None
    fetched_tokens: int
    predicted_queue_s: float
    predicted_fetch_s: float
    predicted_prefill_s: float
    predicted_ttft_s: float
    predicted_tbt_s: float
    queue_key: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillReport:
    """What an instance measured of a prefill that is done.

    Attributes:
        queue_s: from its placement to its start.
        fetch_s: from its placement until the KV of another instance was there; 0 without one.
        execution_s: from its start to its end.
        reused_tokens: whose KV was not computed.
        decodes: false for a request that ends with its first token.
    """

    queue_s: float
    fetch_s: float
    execution_s: float
    reused_tokens: int
    decodes: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class Rejection:
    """HTTP 429: why, what would have happened, and when to try again (seconds)."""

    reason: str
    predicted_ttft_s: float
    predicted_tbt_s: float
    retry_after_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Deferral:
    """The request waits at the Conductor, which hands it out through `Conductor.release` once there is room."""

    predicted_tbt_s: float
