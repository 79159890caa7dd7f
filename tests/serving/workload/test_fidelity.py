"""Errors are relative to the live run, and absent where there is nothing to be relative to."""

import pytest

from serving.workload.fidelity import fidelity_rows


def test_rows_name_each_metric_and_its_relative_error() -> None:
    none = dict.fromkeys(("mean", "p50", "p90", "p99"))
    live = {"goodput_rps": 2.0, "effective_ratio": 0.5, "hit_rate": 0.0, "duration_s": 10.0}
    live |= {"ttft_s": {"mean": 1.0, "p50": 0.8, "p90": 2.0, "p99": 4.0}, "tbt_s": none}
    simulated = live | {
        "goodput_rps": 2.2,
        "hit_rate": 0.1,
        "ttft_s": {"mean": 0.9, "p50": 0.8, "p90": 3.0, "p99": 2.0},
    }
    rows = {row["metric"]: row for row in fidelity_rows(live, simulated)}
    assert rows["goodput_rps"] == {"metric": "goodput_rps", "live": 2.0, "simulated": 2.2, "error": pytest.approx(0.1)}
    errors = [rows[f"ttft_s.{statistic}"]["error"] for statistic in ("mean", "p50", "p90", "p99")]
    assert errors == pytest.approx([-0.1, 0.0, 0.5, -0.5])
    assert rows["effective_ratio"]["error"] == 0.0
    # A live run without hits, or without a second token, has nothing to be relative to.
    assert rows["hit_rate"]["error"] is rows["tbt_s.p90"]["error"] is None
