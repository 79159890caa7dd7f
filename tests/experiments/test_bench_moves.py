"""The bench of KV moves from the command line: every move has a row beside a memcpy."""

import json
import pathlib

from tests.experiments.scripts import run_script


def test_every_move_is_timed(tmp_path: pathlib.Path) -> None:
    done = run_script("bench_moves", tmp_path, "--block_mib=1,2", "--pool_mib=64", "--repeats=2", "--kv_dtype=bfloat16")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["move"], row["block_bytes"] >> 20) for row in rows] == [
        (move, mib) for mib in (1, 2) for move in ("gather", "gather and copy to a slot", "insert")
    ]
    assert all(0 < row["least_s"] <= row["median_s"] and row["per_memcpy"] > 0 for row in rows)


def test_a_block_without_a_page_is_refused(tmp_path: pathlib.Path) -> None:
    done = run_script("bench_moves", tmp_path, "--block_mib=128", "--pool_mib=64", "--repeats=1")
    assert done.returncode != 0
    assert "--block_mib=128 is no block of pages" in done.stderr + done.stdout
