"""Logits equal those of Hugging Face transformers for every family and feature, by committed goldens and live."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.checkpoints import load_hf, save_hf
from model.config import ModelConfig
from model.transformer import Transformer, causal_attend, merge, split
from tests.goldens import make
from tests.model.paged import empty_pools, paged_step

# Logits are float32 of order 4, and transformers sums in another order: 5e-6 was measured.
TOLERANCE = 2e-5


@functools.partial(jax.jit, static_argnums=0)
def _dense_logits(definition, weights, tokens):
    model = merge(definition, weights)
    hidden, _ = model(tokens, jnp.arange(len(tokens)), causal_attend(model.config), None)
    return model.logits(hidden)


@pytest.mark.parametrize("name", make.CONFIGS)
def test_prefill_and_32_decode_steps_equal_the_goldens(name: str, tmp_path: pathlib.Path):
    golden = np.load(make.FOLDER / f"{name}.npz")
    make.write_checkpoint(tmp_path, **json.loads(golden["checkpoint"].item()))
    config, model = load_hf(tmp_path)
    definition, weights = split(model)
    prompt, tokens = golden["prompt"], golden["tokens"]
    np.testing.assert_allclose(_dense_logits(definition, weights, prompt), golden["prefill"], rtol=0, atol=TOLERANCE)

    kv = empty_pools(config, len(prompt) + len(tokens))
    logits, kv = paged_step(definition, weights, prompt, jnp.arange(len(prompt)), kv)
    np.testing.assert_allclose(logits, golden["prefill"], rtol=0, atol=TOLERANCE)
    for step, token in enumerate(tokens):
        position = len(prompt) + step
        assert np.argmax(logits[-1]) == token
        logits, kv = paged_step(definition, weights, token[None], jnp.array([position], jnp.int32), kv)
        np.testing.assert_allclose(logits[0], golden["decode"][step], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", make.CONFIGS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of transformers itself
def test_transformers_loads_what_we_save_and_agrees(name: str, tmp_path: pathlib.Path):
    for package in ("torch", "transformers"):
        pytest.importorskip(package, reason="live parity needs the `parity` extra")
    config = ModelConfig.from_hf(make.CONFIGS[name])
    definition, weights = split(Transformer(config, nnx.Rngs(0)))
    # Initial weights give nearly flat attention and logits near 0; ten times larger, they do not.
    weights = tuple(weight * 10 if weight.ndim > 1 else weight for weight in weights)
    save_hf(tmp_path, merge(definition, weights))
    prompt = np.arange(2, 22, dtype=np.int32)
    prefill, decode, tokens = make.transformers_logits(tmp_path, prompt, 4)
    ours = _dense_logits(definition, weights, jnp.concatenate([prompt, tokens]))
    np.testing.assert_allclose(ours, np.concatenate([prefill, decode]), rtol=0, atol=TOLERANCE)
