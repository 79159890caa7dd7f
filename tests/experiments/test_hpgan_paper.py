"""The paper's page from the command line: three tables within their budgets, clear refusals."""

import json
import pathlib
import subprocess

import pytest

from tests.experiments.scripts import run_script


def run(out: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script("hpgan_paper", out, "--seeds=1", *arguments)


@pytest.mark.slow
def test_a_small_page_has_all_tables_within_their_budgets(tmp_path: pathlib.Path) -> None:
    done = run(
        tmp_path,
        *("--method=random", "--budget=1000"),
        *("--held_out=ob_zcp:7", "--held_out_budget=1000", "--held_out_steps=20"),
        *("--ablation_length=7", "--ablation_budget=1000", "--codec=rank1", "--loss=ns"),
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["verdict"] for row in result["rows"]] == ["reproduced", "reproduced"]  # the two benchmark codes
    held_out = result["totals"]["held_out"]
    assert [row["method"] for row in held_out] == ["GAN, the paper's", "GAN, rank-1 and guided", "random"]
    assert {row["evaluations"] for row in held_out} == {1000}  # 20 updates with guidance would have cost 5,120
    assert [row["guidance"] for row in result["totals"]["ablation"]] == [0.0, 1.0]
    assert all(row["evaluations"] <= 1000 for row in result["totals"]["ablation"])
    assert (tmp_path / "curves.png").stat().st_size > 1000
    for title in ("The papers' numbers and ours", "Held-out class recall", "The paper's loop at N = 7"):
        assert title in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--part=tables", "--part=tables is unknown"),
        ("--held_out=ob_zcp:8", "--held_out=ob_zcp:8: `length` is 8"),
    ],
)
def test_bad_input_is_refused_by_name(tmp_path: pathlib.Path, argument: str, message: str) -> None:
    done = run(tmp_path, argument)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
