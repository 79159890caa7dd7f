"""What became of each request, and the totals of a run: one definition for live and simulated clusters.

TTFT is arrival to first token. A request's TBT is the mean of the longest 10 % of its inter-token gaps (Mooncake,
FAST'25, section 5.1). A request is *effective* when it completed within both SLOs.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

COMPLETED, REJECTED, FAILED = "completed", "rejected", "failed"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutcome:
    """The fate of one request.

    Attributes:
        id: as in its trace.
        arrival_s: seconds since the run's start.
        input_tokens, output_tokens: prompt length, and tokens really generated.
        ttft_s: `None` where no token came.
        tbt_s: `None` where fewer than two tokens came.
        hit_tokens: prompt tokens whose KV was reused.
        prefill, decode: instances that served it; "" where none did.
        outcome: one of `COMPLETED`, `REJECTED`, `FAILED`.
        finished_s: when it ended, in seconds since the run's start.
    """

    id: str
    arrival_s: float
    input_tokens: int
    output_tokens: int
    ttft_s: float | None
    tbt_s: float | None
    hit_tokens: int
    prefill: str
    decode: str
    outcome: str
    finished_s: float


def tbt_s(gaps_s: Sequence[float]) -> float | None:
    """Returns the mean of the longest 10 % (at least one) of the inter-token gaps; `None` without gaps."""
    if not gaps_s:
        return None
    longest = sorted(gaps_s, reverse=True)[: max(1, len(gaps_s) // 10)]
    return sum(longest) / len(longest)


def is_effective(outcome: RequestOutcome, ttft_slo_s: float, tbt_slo_s: float) -> bool:
    """Whether a request completed within both SLOs; without a second token there is no TBT to miss."""
    return (
        outcome.outcome == COMPLETED
        and outcome.ttft_s is not None
        and outcome.ttft_s <= ttft_slo_s
        and (outcome.tbt_s is None or outcome.tbt_s <= tbt_slo_s)
    )


def distribution(values: Iterable[float | None]) -> dict[str, float | None]:
    """mean, p50, p90 and p99 of the values that are there; all `None` when there is none."""
    known = np.array([value for value in values if value is not None], float)
    if not known.size:
        return dict.fromkeys(("mean", "p50", "p90", "p99"))
    p50, p90, p99 = np.percentile(known, (50, 90, 99))
    return {"mean": float(known.mean()), "p50": float(p50), "p90": float(p90), "p99": float(p99)}


def totals(outcomes: Sequence[RequestOutcome], ttft_slo_s: float, tbt_slo_s: float) -> dict[str, Any]:
    """Returns counts, goodput and latency distributions of a run.

    `effective_ratio` is the share of all requests that met both SLOs; `goodput_rps` is their number per second from the
    first arrival to the last end; `hit_rate` is reused over all prompt tokens of the requests that were served.
    """
    effective = sum(is_effective(outcome, ttft_slo_s, tbt_slo_s) for outcome in outcomes)
    served = [outcome for outcome in outcomes if outcome.ttft_s is not None]
    prompt_tokens = sum(outcome.input_tokens for outcome in served)
    begin = min((outcome.arrival_s for outcome in outcomes), default=0.0)
    duration_s = max((outcome.finished_s for outcome in outcomes), default=begin) - begin
    return {
        "requests": len(outcomes),
        "completed": sum(outcome.outcome == COMPLETED for outcome in outcomes),
        "rejected": sum(outcome.outcome == REJECTED for outcome in outcomes),
        "effective_ratio": effective / len(outcomes) if outcomes else 0.0,
        "goodput_rps": effective / duration_s if duration_s > 0 else 0.0,
        "duration_s": duration_s,
        "hit_rate": sum(outcome.hit_tokens for outcome in served) / prompt_tokens if prompt_tokens else 0.0,
        "ttft_s": distribution(outcome.ttft_s for outcome in outcomes),
        "tbt_s": distribution(outcome.tbt_s for outcome in outcomes),
    }


def write_requests(path: str | os.PathLike[str], outcomes: Iterable[RequestOutcome]) -> None:
    """Writes one JSON object per request and line."""
    # `dataclasses.asdict` copies deeply, which would take longer than simulating some clusters.
    names = [field.name for field in dataclasses.fields(RequestOutcome)]
    with pathlib.Path(path).open("w", encoding="utf-8") as file:
        for outcome in outcomes:
            file.write(json.dumps({name: getattr(outcome, name) for name in names}) + "\n")
