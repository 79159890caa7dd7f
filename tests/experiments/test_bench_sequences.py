"""The throughput bench from the command line: every implementation has a row."""

import json
import pathlib

from tests.experiments.scripts import run_script


def test_every_implementation_is_timed(tmp_path: pathlib.Path) -> None:
    done = run_script("bench_sequences", tmp_path, "--length=13", "--batch=64", "--repeats=1", "--budget=0")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (
        {"xla", "numpy", "exact"} <= {row["implementation"] for row in rows} <= {"xla", "cpu kernel", "numpy", "exact"}
    )
    assert all(row["evaluations_per_s"] > 0 for row in rows)
