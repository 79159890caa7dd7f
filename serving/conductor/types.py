"""What the Conductor is told and what it answers. Live and simulated clusters share these types."""

import dataclasses


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
    predicted_tbt_s: float
    queue_key: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrefillReport:
    """What an instance measured of a prefill that is done.

    Attributes:
        started_s: when it began.
        fetched_s: when the KV of another holder was there; `None` where none was fetched.
        execution_s: from its start to its end.
        compute_s: device time.
        reused_tokens: prompt tokens whose KV was not computed.
        slow_tokens: those of `reused_tokens` that were read from the instance's own slow tier.
        decodes: false for a request that ends with its first token.
    """

    started_s: float
    fetched_s: float | None
    execution_s: float
    compute_s: float
    reused_tokens: int
    slow_tokens: int = 0
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
