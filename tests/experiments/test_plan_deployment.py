"""The planning scripts from the command line, on the small trace that ships with the project."""

import json
import pathlib
import subprocess

import pytest

from tests.experiments.scripts import TRACE, run_script


def run(script: str, out: pathlib.Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_script(script, out, f"--trace={TRACE}", *arguments)


def test_a_deployment_is_planned_and_put_to_the_test(tmp_path: pathlib.Path) -> None:
    arguments = ("--model=llama3-8b", "--devices=h100,l40s", "--budget_per_hour=20", "--confirm=2", "--kv=int8")
    done = run("plan_deployment", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    prices = [row["price_per_hour"] for row in result["rows"]]
    assert prices == sorted(prices)
    assert prices[-1] <= 20
    tested = result["totals"]["tested"]
    assert 1 <= len(tested) <= 2
    for row in tested:
        assert row["verdict"] in ("confirmed", "refuted")
        assert row["simulated_rps"] > 0
        assert row["kv"] == "int8"
    assert (tmp_path / "frontier.png").stat().st_size > 1000
    assert "Frontier" in done.stdout
    assert "Put to the test" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices=h1000"], "No device `h1000`; known: h100"),
        (["--devices=rtx3090", "--budget_per_hour=0.9"], "llama3-70b fits on nothing offered"),
    ],
)
def test_bad_input_is_one_clear_message(tmp_path: pathlib.Path, arguments: list[str], message: str) -> None:
    done = run("plan_deployment", tmp_path, *arguments)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_capacity_is_planned_and_cheaper_ones_explained(tmp_path: pathlib.Path) -> None:
    arguments = ("--devices=a800x8,h100x4", "--dram_gb=0,100", "--ssd_gb=0", "--ttft_slo_s=5", "--speed=20")
    done = run("plan_capacity", tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    best = result["totals"]["best"]
    assert best["meets"]
    assert best["price_per_hour"] == min(row["price_per_hour"] for row in result["rows"] if row["meets"])
    assert "Cheapest for 95% of demo_trace" in done.stdout
    done = run("plan_capacity", tmp_path, "--dram_gb=much")
    assert done.returncode != 0
    assert "flag --dram_gb=much: give numbers with commas between them" in done.stderr
