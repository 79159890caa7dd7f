"""The search script from the command line: files, table, clear refusals."""

import json
import pathlib

import pytest

from gan import catalogue
from tests.experiments.scripts import run_script


@pytest.mark.parametrize(
    ("arguments", "classes"),  # all there are
    [(("--problem=ob_zcp",), 4), (("--problem=ob_zcp_folded", "--kind=2", "--population=40"), 9)],
)
def test_a_small_search_writes_curves_and_a_catalogue_that_checks(
    arguments: tuple[str, ...], classes: int, tmp_path: pathlib.Path
) -> None:
    small = ("--length=7", "--method=hpgan", "--budget=2000", "--seeds=3-4")
    done = run_script("search_sequences", tmp_path, *arguments, *small)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert {row["seed"] for row in result["rows"]} == {3, 4}
    assert set(result["rows"][0]) == {"method", "seed", "evaluations", "best"}
    entries = list(catalogue.read(tmp_path / "catalogue.jsonl"))
    assert {entry.value for entry in entries} == {0.0}
    assert result["totals"]["hpgan"]["classes"]["max"] <= classes
    for plot in ("curves.png", "classes.png"):
        assert (tmp_path / plot).stat().st_size > 1000
    assert "evaluations to found" in done.stdout
    assert "hpgan seed 3" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--method=luck",), "--method=luck is unknown"),
        (("--seeds=5-3",), "'5-3' is neither a seed nor a range"),
        (("--problem=ob_zcp", "--length=8"), "needs an odd length"),
        (("--problem=mmf", "--kind=2"), "--kind belongs to --problem=ob_zcp"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path: pathlib.Path, arguments: tuple[str, ...], message: str) -> None:
    done = run_script("search_sequences", tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
