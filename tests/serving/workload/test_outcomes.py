"""Totals of a run, against sums done by hand."""

import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.workload.outcomes import COMPLETED, REJECTED, RequestOutcome, tbt_s, totals, write_requests


def outcome(index: int, ttft_s: float | None, tbt: float | None, hit: int = 0, fate: str = COMPLETED) -> RequestOutcome:
    finished = float(index) if ttft_s is None else index + ttft_s + 1
    return RequestOutcome(
        id=index,
        arrival_s=float(index),
        input_tokens=100,
        output_tokens=5,
        ttft_s=ttft_s,
        tbt_s=tbt,
        hit_tokens=hit,
        prefill="p0",
        decode="d0",
        outcome=fate,
        finished_s=finished,
    )


def test_totals_by_hand() -> None:
    runs = [outcome(0, 1.0, 0.05, 50), outcome(1, 40.0, 0.05), outcome(2, 1.0, 0.2), outcome(3, 2.0, None, 100)]
    result = totals([*runs, outcome(4, None, None, fate=REJECTED)], ttft_slo_s=30, tbt_slo_s=0.1)
    assert (result["requests"], result["completed"], result["rejected"]) == (5, 4, 1)
    assert result["effective_ratio"] == 2 / 5
    assert result["duration_s"] == 42
    assert result["goodput_rps"] == 2 / 42
    assert result["hit_rate"] == 150 / 400
    assert result["ttft_s"]["p50"] == 1.5
    assert result["tbt_s"]["mean"] == pytest.approx(0.1)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=100))
def test_tbt_lies_between_the_mean_and_the_longest_gap(gaps: list[float]) -> None:
    value = tbt_s(gaps)
    assert value is not None
    assert sum(gaps) / len(gaps) - 1e-9 <= value <= max(gaps) + 1e-9


def test_tbt_of_twenty_gaps_is_the_mean_of_two() -> None:
    assert tbt_s([0.1] * 18 + [0.5, 0.7]) == pytest.approx(0.6)
    assert tbt_s([]) is None


def test_an_empty_run_has_totals() -> None:
    assert totals([], 1, 1)["effective_ratio"] == 0


def test_requests_file(tmp_path: pathlib.Path) -> None:
    write_requests(tmp_path / "requests.jsonl", [outcome(0, 1.0, 0.1), outcome(1, None, None)])
    rows = [json.loads(line) for line in (tmp_path / "requests.jsonl").read_text().splitlines()]
    assert [row["ttft_s"] for row in rows] == [1.0, None]
