"""The bench of the engine, small, from the command line."""

import dataclasses
import json
import pathlib

import pytest
from flax import nnx

from experiments.common import engine_speed
from experiments.common.engine_workload import row
from model.checkpoints import save_hf
from model.presets import preset
from model.transformer import Transformer
from tests.experiments.scripts import run_script

TINY = dataclasses.replace(
    preset("bench-58m"), vocab_size=1024, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=4
)
TINY = dataclasses.replace(TINY, num_kv_heads=2, head_dim=8)


@pytest.mark.slow
def test_every_measured_step_decodes_the_whole_batch(tmp_path: pathlib.Path) -> None:
    """The run itself checks that; prompts of several steps each, so that sequences do not begin together."""
    save_hf(tmp_path / "model", Transformer(TINY, nnx.Rngs(0)))
    sizes = ("--batches=1,2", "--contexts=100", "--prefill=16", "--steps=3", "--repeats=2")
    done = run_script("bench_engine", tmp_path, f"--model={tmp_path / 'model'}", "--peer=deterministic", *sizes)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["engine"], row["test"], row["batch"], row["context"]) for row in rows] == [
        (engine, *test)
        for engine in ("halfmoon", "deterministic")
        for test in (("prefill", 1, 16), ("mixed", 4, 16), ("decode", 1, 100), ("decode", 2, 100))
    ]
    assert all(row["tok_s"] > 0 and row["tok_core_s"] > 0 for row in rows)


@pytest.mark.parametrize(("device", "ratio"), [("cpu", 2.0), ("cuda", 3.0)])
def test_engines_compare_by_core_seconds_on_cpu_alone(device: str, ratio: float) -> None:
    ours = row("ours", "cpu" if device == "cpu" else "gpu", "decode", 1, 8, [(9.0, 4.0)])
    theirs = row("theirs", device, "decode", 1, 8, [(3.0, 2.0)])
    assert engine_speed.compared(ours, theirs)["peer_ratio"] == ratio


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches=1,many"], "--batches=1,many: give whole numbers"),
        (["--cores=4096"], "--cores=4096, but this process may use"),
        (["--model=nowhere"], "No `config.json` at nowhere"),
    ],
)
def test_bad_input_is_told(tmp_path: pathlib.Path, arguments: list[str], message: str) -> None:
    done = run_script("bench_engine", tmp_path, *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert not (tmp_path / "result.json").exists()
