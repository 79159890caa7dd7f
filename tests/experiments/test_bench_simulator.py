"""The bench of the simulator, small, from the command line."""

import json
import pathlib

from tests.experiments.scripts import ROOT, run_script


def test_it_measures_every_case(tmp_path: pathlib.Path) -> None:
    trace = ROOT / "experiments" / "assets" / "demo_trace.jsonl"
    sizes = ("--requests=100,400", "--instances=16,64")
    done = run_script("bench_simulator", tmp_path, f"--trace={trace}", *sizes)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["trace"], row["requests"], row["instances"]) for row in rows] == [
        ("demo_trace", 263, 16),
        ("synthetic", 100, 16),
        ("synthetic", 400, 16),
        ("synthetic", 100, 64),
    ]
    for row in rows:
        assert row["events_per_request"] >= 1
        assert 0 < row["user_sys_s"] < 60
        assert 10 < row["peak_rss_mib"] < 2048


def test_a_run_that_fails_ends_it(tmp_path: pathlib.Path) -> None:
    done = run_script("bench_simulator", tmp_path, "--requests=100", "--instances=16", "--placement=nowhere")
    assert done.returncode != 0
    assert "`simulate_cluster` ended with 1." in done.stderr
    assert "nowhere" in done.stderr
    assert "Traceback" not in done.stderr
