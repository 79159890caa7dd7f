"""The bench of paged attention from the command line, on sizes that take no time."""

import json
import os
import subprocess
import sys

import pytest

from experiments.common.attention_speed import Case, cases
from tests.experiments.scripts import ROOT, run_script

TINY = ["--batch=2", "--context=40", "--q_heads=4", "--kv_heads=2", "--head_dim=64", "--page_size=16", "--repeats=2"]
SIZES = {"batch": 2, "context": 40, "q_heads": 4, "kv_heads": 2, "head_dim": 64, "page_size": 16}


def run(out, *arguments):
    return run_script("bench_paged_attention", out, *TINY, *arguments)


def test_every_backend_and_size_has_a_row_and_agrees_with_xla(tmp_path):
    done = run(tmp_path, "--backend=auto,xla,jax_triton", "--dtype=float32", "--query_len=1,7")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    keys = [(row["query_len"], row["backend"]) for row in result["rows"]]
    assert keys == [(1, "auto"), (1, "xla"), (7, "auto"), (7, "xla")]
    for row in result["rows"]:
        assert SIZES.items() <= row.items()
        assert row["time_s"] > 0
        assert row["fraction_of_ceiling"] > 0
        # Tens of float32 roundings of results of order 1.
        assert row["max_difference"] < 1e-5
        assert row["gb_s"] == pytest.approx(row["bytes"] / row["time_s"] / 1e9)
    assert "GPU" in result["totals"]["left_out"]["jax_triton"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--backend=triton", "is unknown"),
        ("--backend=mosaic_gpu", "run it on a gpu"),
        ("--q_heads=3", "not a multiple of"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, argument, message):
    sizes = [size for size in TINY if size.partition("=")[0] != argument.partition("=")[0]]
    done = run_script("bench_paged_attention", tmp_path, *sizes, argument)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_block_sizes_are_not_tuned_where_kernels_are_interpreted():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.tune_paged_attention", "--batch=1"],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "Nothing is tuned on cpu" in done.stdout + done.stderr


def test_work_of_a_case():
    (case,) = cases(dtype=["bfloat16"], query_len=[3], **{name: [size] for name, size in SIZES.items()})
    assert case.bytes == 2 * 2 * 40 * 2 * 64 * 2
    assert case.flops == 2 * 4 * (38 + 39 + 40) * 4 * 64
    quantized = Case(dtype="int8", query_len=1, **SIZES)
    assert quantized.bytes == 2 * 2 * 40 * 2 * (64 + 4)
