"""`convert_model` from the command line."""

import json
import pathlib

from tests.experiments.scripts import run_script


def test_a_preset_is_cut_without_its_weights(tmp_path: pathlib.Path) -> None:
    done = run_script("convert_model", tmp_path, "--model=llama3.2-1b", "--batch=4")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    totals = result["totals"]
    assert (totals["slices"], len(totals["programs"])) == (33, 4)
    assert totals["crossing_bytes"] == totals["formula_bytes"] == 16 * 4 * 2 * (2 * 2048 + 2 * 512)
    assert {row["context_bytes"] for row in result["rows"]} == {4 * 2048 * 2}
    assert (tmp_path / "cut.png").stat().st_size > 1000


def test_a_mistyped_preset_is_suggested(tmp_path: pathlib.Path) -> None:
    done = run_script("convert_model", tmp_path, "--model=llama3.2-1x")
    assert done.returncode != 0
    assert "did you mean `llama3.2-1b`?" in done.stderr
