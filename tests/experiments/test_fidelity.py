"""Calibration and fidelity from the command line: a tiny engine is measured, simulated and compared with itself."""

import json
import pathlib
import subprocess

import pytest

from tests.experiments.scripts import ROOT, TRACE, run_script
from tests.serving.api.conftest import tiny_model as tiny_model

ENGINE = ("--page_size=8", "--num_pages=40", "--max_batch=2", "--token_budget=16", "--max_prefill_rows=1")
FLAGS = (*ENGINE, "--max_model_len=80", f"--compilation_cache={ROOT / '.jax_cache'}")
SLICE = (f"--trace={TRACE}", "--shrink=64", "--shrink_outputs=32", "--requests=30", "--runs=2", "--speed=4")


def said(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


@pytest.mark.slow
def test_an_engine_is_calibrated_simulated_and_compared(tiny_model: pathlib.Path, tmp_path: pathlib.Path) -> None:
    engine = (f"--model={tiny_model}", *FLAGS)
    done = run_script("calibrate", tmp_path, *engine, "--repeats=1")
    assert done.returncode == 0, done.stderr
    calibration = tmp_path / "calibration.json"
    result = json.loads((tmp_path / "result.json").read_text())
    assert {row["test"] for row in result["rows"]} == {"prefill", "decode", "padded shape"}
    assert result["totals"]["errors"]["steps, fitted"]["samples"] > 50
    steps = json.loads(calibration.read_text())["engine"]["steps"]
    for noise in (steps["decode_noise"], steps["prefill_noise"]):
        assert len(noise) > 20
        assert noise == sorted(noise)

    done = run_script("simulate_cluster", tmp_path / "cluster", f"--calibration={calibration}", f"--trace={TRACE}",
               "--shrink=64", "--prefill=0", "--decode=0", "--coupled=2")  # fmt: skip
    assert done.returncode == 0, done.stderr

    done = run_script("fidelity", tmp_path / "fidelity", *engine, *SLICE, f"--calibration={calibration}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "fidelity" / "result.json").read_text())
    rows = {row["metric"]: row for row in result["rows"]}
    assert rows["hit_rate"]["live"] == pytest.approx(rows["hit_rate"]["simulated"], abs=0.05)
    assert rows["hit_rate"]["live"] > 0.1
    for metric in ("ttft_s.p50", "tbt_s.p50", "tbt_s.p99", "duration_s"):
        assert rows[metric]["live"] > 0
        assert rows[metric]["simulated"] > 0
    assert result["totals"]["requests"] == 30
    assert result["totals"]["compiles_after_warm_up"] == 0

    other = run_script(
        "fidelity", tmp_path / "other", *engine, *SLICE, f"--calibration={calibration}", "--num_pages=41"
    )
    assert "was not made for an engine of" in said(other)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("calibrate", ("--model=nowhere",), "nowhere"),
        ("calibrate", ("--clock=cpu", "--cores=2"), "CPU time is a clock on one core only; use --cores=1"),
        ("calibrate", ("--page_size=2",), "--page_size=2: what is generated must not fill a page; use 4 or more"),
        ("calibrate", ("--noprefix_cache",), "prompts with cached tokens are measured too; leave the cache on"),
        ("calibrate", ("--kv_dtype=int8",), "flag --kv_dtype=int8: value should be one of <float32|bfloat16|float16>"),
        ("calibrate", ("--attention=fast",), "flag --attention=fast: value should be one of <cpu_ffi|"),
        ("fidelity", ("--trace=nowhere.jsonl",), "nowhere.jsonl is not a file; name a Mooncake JSONL"),
        ("fidelity", (f"--trace={TRACE}", "--requests=9999"), "requests, not 9999 from number 60 on; ask for fewer"),
    ],
)
def test_bad_input_is_one_clear_message(
    script: str, arguments: tuple[str, ...], message: str, tmp_path: pathlib.Path
) -> None:
    assert message in said(run_script(script, tmp_path, *arguments))
