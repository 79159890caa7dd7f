"""What `experiments/h200.sh` runs on a GPU, tried on CPU: its commands, and its parts at sizes that take no time."""

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.common import attention_peers, attention_speed, pair_speed
from model.kernels.paged_attention import paged_attention
from model.presets import PRESETS

ROOT = pathlib.Path(__file__).parent.parent.parent
SCRIPT = ROOT / "experiments" / "h200.sh"


def test_the_limits_add_up_to_ten_minutes():
    limits = re.findall(r"^(?:step|run|bench) \w+ (\d+) ", SCRIPT.read_text(), re.MULTILINE)
    assert len(limits) == 8
    assert sum(map(int, limits)) <= 600


@pytest.mark.slow
def test_every_command_of_a_dry_run_is_accepted(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [SCRIPT, "--dry-run", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("== ") == 8
    for peer, module in (("torch_sdpa", "torch"), ("flashinfer", "flashinfer")):
        try:
            __import__(module)
        except ImportError:
            assert f"{peer} is left out" in done.stdout


def test_a_machine_without_a_gpu_is_told_so(tmp_path):
    environment = os.environ | {"PYTHON": "false"}
    done = subprocess.run([SCRIPT, str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs a Hopper GPU" in done.stderr


def test_a_pair_and_one_device_do_the_same_work():
    """Two CPU devices stand for a GPU and its host."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "num_kv_heads": 1}
    config = dataclasses.replace(PRESETS["bench-58m"], **sizes)
    first, second = jax.devices()[:2]
    for attention, crossing in ((first, 0), (second, 2 * 2 * 3 * 64 * (2 * 2 + 2))):
        row = pair_speed.measure(config, 2, 3, 100, pair_speed.Pair(first, attention), repeats=1)
        assert row["tok_s"] == pytest.approx(3 / row["step_s"])
        assert row["crossing_bytes"] == crossing


def test_peers_say_why_they_are_left_out():
    (case,) = attention_speed.cases(
        dtype=["int8"], batch=[1], context=[32], query_len=[1], q_heads=[2], kv_heads=[1], head_dim=[64], page_size=[16]
    )
    with pytest.raises(NotImplementedError, match="torch_sdpa is measured on KV in the dtype of q"):
        attention_peers.prepared("torch_sdpa", case.build(0), 1)
    batch = dataclasses.replace(case, dtype="float32").build(0)
    with pytest.raises(NotImplementedError, match="FlashInfer is for GPUs; these devices are cpu"):
        attention_peers.prepared("flashinfer", batch, 1)


@pytest.mark.parametrize("query_len", [1, 7, 40])
def test_torch_over_gathered_pages_agrees(query_len):
    pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
    (case,) = attention_speed.cases(
        dtype=["float32"],
        batch=[2],
        context=[40],
        query_len=[query_len],
        q_heads=[4],
        kv_heads=[2],
        head_dim=[64],
        page_size=[16],
    )
    batch = case.build(0)
    ours = paged_attention(*batch, max_query_len=query_len, implementation="xla")
    theirs = attention_peers.prepared("torch_sdpa", batch, query_len)(1)
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-5)
