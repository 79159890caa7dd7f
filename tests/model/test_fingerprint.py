"""Fingerprints: equal for copies of one checkpoint, different wherever a slice of any file is."""

import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.checkpoints import CheckpointError, fingerprint, save, save_hf
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.training.vocabulary import train_tokenizer
from model.transformer import Transformer

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    intermediate_size=32,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[pathlib.Path]:
    """The same weights as a Hugging Face folder of several files, and as an Orbax checkpoint."""
    base = tmp_path_factory.mktemp("checkpoints")
    model = Transformer(CONFIG, nnx.Rngs(0))
    save_hf(base / "hf", model, max_file_bytes=20_000)
    save(base / "orbax", model)
    return [base / "hf", base / "orbax"]


def test_copies_have_one_fingerprint_and_every_file_counts(folders: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
    for folder in folders:
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        assert fingerprint(copy) == fingerprint(folder)
        for path in (path for path in copy.rglob("*") if path.stat().st_size and path.is_file()):
            before = path.read_bytes()
            path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
            assert fingerprint(copy) != fingerprint(folder), path
            path.write_bytes(before)


def test_a_file_beside_the_weights_does_not_count(folders: list[pathlib.Path], tmp_path: pathlib.Path) -> None:
    copy = tmp_path / "hf"
    shutil.copytree(folders[0], copy)
    (copy / "README.md").write_text("Our model.")
    assert fingerprint(copy) == fingerprint(folders[0])


def test_one_changed_layer_of_a_large_file_is_seen(tmp_path: pathlib.Path) -> None:
    """A tenth of the weights of 4 MB is changed; the slices are 64 KiB apart."""
    (tmp_path / "config.json").write_text("{}")
    weights = np.random.default_rng(0).integers(0, 256, 4 << 20, np.uint8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(weights.tobytes())
    before = fingerprint(tmp_path)
    weights[1_000_000:1_400_000] += 1
    path.write_bytes(weights.tobytes())
    assert fingerprint(tmp_path) != before


def test_dtype_preset_and_seed_count(folders: list[pathlib.Path]) -> None:
    names = [fingerprint(folders[0], dtype) for dtype in (None, "float32", jnp.bfloat16)]
    names += [fingerprint("bench-58m"), fingerprint("bench-58m", seed=1), fingerprint("llama3.2-1b")]
    assert len(set(names)) == len(names)
    assert fingerprint(folders[0], "bfloat16") == names[2]
    with pytest.raises(CheckpointError, match="`nowhere` is neither a folder nor a preset"):
        fingerprint("nowhere")


def test_tokenizers_are_told_apart() -> None:
    texts = ("the dict class", "the list class", "a tuple is a list")
    small, large = (Tokenizer(train_tokenizer(texts, vocab_size=size)) for size in (258, 262))
    assert small.fingerprint == Tokenizer(train_tokenizer(texts, vocab_size=258)).fingerprint
    assert small.fingerprint != large.fingerprint
