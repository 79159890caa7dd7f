"""How far a simulated run is from a live one of the same requests, metric by metric."""

from collections.abc import Mapping
from typing import Any

_STATISTICS = ("mean", "p50", "p90", "p99")
# Names of `outcomes.totals`, and which statistic where that is a distribution.
_METRICS = (
    *(("ttft_s", statistic) for statistic in _STATISTICS),
    *(("tbt_s", statistic) for statistic in _STATISTICS),
    ("goodput_rps", None),
    ("effective_ratio", None),
    ("hit_rate", None),
    ("duration_s", None),
)


def fidelity_rows(live: Mapping[str, Any], simulated: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns rows {metric, live, simulated, error} from the `totals` of two runs.

    `error` is relative to `live`; `None` where `live` is 0 or either run has no value.
    """
    rows = []
    for name, statistic in _METRICS:
        measured, modelled = (totals[name][statistic] if statistic else totals[name] for totals in (live, simulated))
        rows.append(
            {
                "metric": f"{name}.{statistic}" if statistic else name,
                "live": measured,
                "simulated": modelled,
                "error": modelled / measured - 1 if measured and modelled is not None else None,
            }
        )
    return rows
