"""Checkpoints: round trips through both formats, meshes and dtypes, memory, and what is refused."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from model.checkpoints import CheckpointError, load_hf, restore, save, save_hf
from model.config import ModelConfig, UnsupportedModelError
from model.sharding import MeshError, parse_mesh
from model.transformer import Transformer, split

CONFIG = ModelConfig(
    model_type="mixtral",
    vocab_size=40,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=24,
    num_experts=4,
    experts_per_token=2,
    moe_intermediate_size=24,
)
DENSE = dataclasses.replace(CONFIG, model_type="llama", num_experts=0, experts_per_token=0, moe_intermediate_size=0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(CONFIG, nnx.Rngs(0))


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A dense checkpoint in one file."""
    save_hf(tmp_path, Transformer(DENSE, nnx.Rngs(0)))
    return tmp_path


def _assert_same(expected: Transformer, actual: Transformer, dtype=jnp.float32) -> None:
    assert split(actual)[0] == split(expected)[0]
    for a, b in zip(split(expected)[1], split(actual)[1], strict=True):
        assert b.dtype == dtype
        np.testing.assert_array_equal(a.astype(dtype), b)


def _both_formats(folder: pathlib.Path, model: Transformer):
    save_hf(folder / "hf", model)
    save(folder / "orbax", model)
    return (load_hf, folder / "hf"), (restore, folder / "orbax")


def test_round_trip_onto_other_meshes_and_dtypes(tmp_path: pathlib.Path, model: Transformer):
    for load, where in _both_formats(tmp_path, model):
        for mesh in (None, parse_mesh("tp:2")):
            for dtype in (None, jnp.bfloat16):
                config, loaded = load(where, mesh, dtype)
                assert config == CONFIG
                _assert_same(model, loaded, dtype or jnp.float32)
                gate = loaded.layers[0].mlp.experts.gate_proj[...]
                rows = {shard.data.shape for shard in gate.addressable_shards}
                assert rows == {(4, 24 if mesh is None else 12, 16)}


def test_a_model_saved_from_a_mesh_is_whole(tmp_path: pathlib.Path, model: Transformer):
    save_hf(tmp_path / "one", model)
    _, sharded = load_hf(tmp_path / "one", parse_mesh("tp:2"))
    for load, where in _both_formats(tmp_path / "sharded", sharded):
        _assert_same(model, load(where)[1])


def test_several_files_hold_what_one_holds(tmp_path: pathlib.Path, model: Transformer):
    save_hf(tmp_path, model, max_file_bytes=5000)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= 5000 for file in files)
    _assert_same(model, load_hf(tmp_path)[1])


def test_float16_and_bfloat16_are_kept_as_stored(tmp_path: pathlib.Path):
    for dtype in (jnp.float16, jnp.bfloat16):
        half = Transformer(DENSE, nnx.Rngs(0), dtype)
        save_hf(tmp_path / str(jnp.dtype(dtype)), half)
        _assert_same(half, load_hf(tmp_path / str(jnp.dtype(dtype)))[1], dtype)


_PEAK_OF_LOADING = """
import pathlib, sys, threading
import jax
from model.checkpoints import load_hf

def anonymous_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024

jax.block_until_ready(jax.numpy.zeros(3))
base, peak, done = anonymous_bytes(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, anonymous_bytes())

thread = threading.Thread(target=watch)
thread.start()
model = load_hf(sys.argv[1])
done.set()
thread.join()
print(peak - base)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_loading_never_holds_the_model_twice(tmp_path: pathlib.Path):
    config = dataclasses.replace(DENSE, hidden_size=512, intermediate_size=2048, num_layers=6)
    save_hf(tmp_path, Transformer(config, nnx.Rngs(0)))
    script = [sys.executable, "-c", _PEAK_OF_LOADING, str(tmp_path)]
    peak = int(subprocess.run(script, capture_output=True, text=True, check=True).stdout)
    model_bytes = 4 * config.parameter_count  # 76 MB
    # Pages of the file are not counted, for the kernel may drop them; the rest is one tensor (4 MB) and Python objects.
    assert model_bytes < peak < 1.4 * model_bytes


def test_every_missing_extra_and_misshaped_tensor_is_listed(folder: pathlib.Path):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"], tensors["model.norm.weight"]
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["lm_head.weight"] = np.zeros((41, 16), np.float32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(2, np.float32)  # Old Llama files; ignored.
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_hf(folder)
    assert str(error.value).splitlines()[1:] == [
        "  missing model.layers.0.self_attn.q_proj.weight [16, 16]",
        "  missing model.norm.weight [16]",
        "  unexpected model.layers.2.mlp.up_proj.weight",
        "  lm_head.weight has shape [41, 16], the config says [40, 16]",
    ]


def test_a_second_copy_of_a_tied_embedding_is_ignored(folder: pathlib.Path):
    hf = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "config.json").write_text(json.dumps(hf))
    assert load_hf(folder)[1].lm_head is None


def test_a_truncated_file_is_an_error_that_names_it(folder: pathlib.Path):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + " is damaged"):
        load_hf(folder)


def test_absent_files_are_listed(tmp_path: pathlib.Path, model: Transformer):
    save_hf(tmp_path, model, max_file_bytes=20000)
    first, second, *_ = sorted(file.name for file in tmp_path.glob("model-*.safetensors"))
    (tmp_path / first).unlink()
    (tmp_path / second).unlink()
    with pytest.raises(CheckpointError, match=f"lacks {first}, {second}"):
        load_hf(tmp_path)


def test_what_does_not_fit_is_refused_before_reading(folder: pathlib.Path):
    with pytest.raises(MeshError, match=r"over 4 devices does not divide 2 \(KV heads\)"):
        load_hf(folder, parse_mesh("tp:4"))
    (folder / "config.json").write_text('{"model_type": "bloom"}')
    with pytest.raises(UnsupportedModelError, match="'bloom'"):
        load_hf(folder)


def test_orbax_refuses_what_is_not_its_checkpoint(folder: pathlib.Path, model: Transformer):
    with pytest.raises(CheckpointError, match="is not an Orbax checkpoint"):
        restore(folder)
    with pytest.raises(CheckpointError, match="exists already"):
        save(folder, model)


def test_restored_weights_compute_the_same(tmp_path: pathlib.Path, model: Transformer):
    save(tmp_path / "orbax", model)
    hidden = jax.random.normal(jax.random.key(0), (3, CONFIG.hidden_size))
    np.testing.assert_array_equal(restore(tmp_path / "orbax")[1].logits(hidden), model.logits(hidden))
