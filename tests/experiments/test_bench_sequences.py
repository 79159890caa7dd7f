"""The throughput bench from the command line: every implementation has a row."""

import json
import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_every_implementation_is_timed(tmp_path: pathlib.Path) -> None:
    flags = ["--length=13", "--batch=64", "--repeats=1", "--budget=0", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "experiments.bench_sequences", *flags]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (
        {"xla", "numpy", "exact"} <= {row["implementation"] for row in rows} <= {"xla", "cpu kernel", "numpy", "exact"}
    )
    assert all(row["evaluations_per_s"] > 0 for row in rows)
