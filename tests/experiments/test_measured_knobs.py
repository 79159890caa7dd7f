"""From a bench's file to a file of knobs, from the command line."""

import json
import pathlib
import subprocess

import pytest

from attention_offload.costs.knobs import load_knobs
from attention_offload.devices import load_devices
from tests.experiments.scripts import run_script

CPU = load_devices()["cpu"]


def measured_knobs(folder: pathlib.Path, gb_s: float, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "attention.json").write_text(json.dumps({"rows": [{"gb_s": gb_s}]}))
    files = (f"--attention={folder / 'attention.json'}", *arguments)
    return run_script("measured_knobs", folder, "--device=cpu", *files)


@pytest.mark.parametrize(("arguments", "scale"), [((), 1), (("--attention_cores=96",), 2)])
def test_a_bench_of_the_whole_device_needs_no_scale(tmp_path: pathlib.Path, arguments, scale: float) -> None:
    done = measured_knobs(tmp_path, 300.0, "--cores=192", *arguments)
    assert done.returncode == 0, done.stderr
    knobs = load_knobs("measured", tmp_path / "knobs.json")
    assert knobs.attention_memory_efficiency == pytest.approx(scale * 300e9 / CPU.memory_bandwidth)


def test_more_than_the_device_has_is_refused(tmp_path: pathlib.Path) -> None:
    done = measured_knobs(tmp_path, 300.0, "--cores=192", "--attention_cores=2")
    assert done.returncode != 0
    assert "Knob `attention_memory_efficiency` is a share between 0 and 1" in done.stdout + done.stderr
    assert not (tmp_path / "knobs.json").exists()
