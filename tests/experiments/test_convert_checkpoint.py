"""The conversion script, run as a user runs it."""

import dataclasses
import pathlib
import subprocess

import numpy as np
import pytest
from flax import nnx

from model.checkpoints import load, load_hf, save_hf
from model.presets import preset
from model.transformer import Transformer, split
from tests.experiments.scripts import run_command

TINY = dataclasses.replace(
    preset("qwen3-0.6b"), vocab_size=32, hidden_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=4
)
TINY = dataclasses.replace(TINY, intermediate_size=24)


def _convert(source: pathlib.Path, target: pathlib.Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return run_command("experiments.convert_checkpoint", f"--source={source}", f"--target={target}", *flags)


def test_there_and_back_again(tmp_path: pathlib.Path):
    save_hf(tmp_path / "hf", Transformer(TINY, nnx.Rngs(0)))
    (tmp_path / "hf" / "tokenizer.json").write_text("{}")
    there = _convert(tmp_path / "hf", tmp_path / "orbax", "--to=orbax", "--mesh=tp:2", "--dtype=bfloat16")
    assert (there.returncode, there.stderr) == (0, "")
    back = _convert(tmp_path / "orbax", tmp_path / "back", "--to=hf")
    assert back.returncode == 0
    assert (tmp_path / "back" / "tokenizer.json").read_text() == "{}"
    config, expected = load_hf(tmp_path / "hf", dtype="bfloat16")
    _, actual = load(tmp_path / "back")
    assert config == TINY
    for a, b in zip(split(expected)[1], split(actual)[1], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("nowhere", ["--to=hf"], "neither a folder nor a preset"),
        ("hf", ["--to=hf", "--mesh=tp:4"], "does not divide 2 (KV heads)"),
    ],
)
def test_refusals_are_one_line(tmp_path: pathlib.Path, source: str, flags: list[str], message: str):
    save_hf(tmp_path / "hf", Transformer(TINY, nnx.Rngs(0)))
    refused = _convert(tmp_path / source, tmp_path / "target", *flags)
    assert refused.returncode == 1
    assert message in refused.stderr
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "target").exists()
