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
    small = ("--length=7", "--method=surrogate", "--budget=2000", "--seeds=3-4")
    done = run_script("search_sequences", tmp_path, *arguments, *small)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert {row["seed"] for row in result["rows"]} == {3, 4}
    assert set(result["rows"][0]) == {
        *("length", "method", "seed", "evaluations", "gradients", "cpu_s", "best", "evaluations_at_chips")
    }
    entries = list(catalogue.read(tmp_path / "catalogue.jsonl"))
    assert {entry.value for entry in entries} == {0.0}
    assert result["totals"]["surrogate"]["classes"]["max"] <= classes
    for plot in ("curves.png", "classes.png"):
        assert (tmp_path / plot).stat().st_size > 1000
    assert "evaluations to found" in done.stdout
    assert "surrogate seed 3" in done.stderr


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


def test_several_lengths_leave_no_plot_of_an_earlier_run(tmp_path: pathlib.Path) -> None:
    (tmp_path / "classes_131.png").write_text("of an earlier run")
    small = ("--problem=mmf_skew", "--length=3,131", "--method=random", "--budget=20")
    done = run_script("search_sequences", tmp_path, *small)
    assert done.returncode == 0, done.stderr
    assert {entry.problem.length for entry in catalogue.read(tmp_path / "catalogue.jsonl")} == {3, 131}
    assert set(json.loads((tmp_path / "result.json").read_text())["totals"]) == {"3", "131"}
    assert "pulse compression, skew-symmetric codes, N = 131" in done.stdout
    assert (tmp_path / "curves_3.png").exists()
    assert not (tmp_path / "classes_131.png").exists()  # nothing is known at N = 131, so nothing is a hit
