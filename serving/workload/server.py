"""What serves a trace: a simulated cluster, a live one, or one engine; and how far two of them are apart."""

from collections.abc import Sequence
from typing import Any, Protocol

from serving.workload.outcomes import RequestOutcome
from serving.workload.requests import Trace


class TraceServer(Protocol):
    """Anything that plays a trace in open loop and says what became of each request, in order of the trace."""

    def serve(self, trace: Trace) -> Sequence[RequestOutcome]: ...


METRICS = (
    *(("ttft_s", statistic) for statistic in ("mean", "p50", "p90", "p99")),
    *(("tbt_s", statistic) for statistic in ("mean", "p50", "p90", "p99")),
    ("goodput_rps", None),
    ("effective_ratio", None),
    ("hit_rate", None),
    ("duration_s", None),
)


def compare(live: dict[str, Any], simulated: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows {metric, live, simulated, error} from the `totals` of two runs; error is relative to `live`."""
    rows = []
    for name, statistic in METRICS:
        measured, modelled = (totals[name][statistic] if statistic else totals[name] for totals in (live, simulated))
        error = modelled / measured - 1 if measured and modelled is not None else None
        rows.append(
            {
                "metric": f"{name}.{statistic}" if statistic else name,
                "live": measured,
                "simulated": modelled,
                "error": error,
            }
        )
    return rows
