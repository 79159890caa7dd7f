"""Presets have the sizes that their makers publish, and large ones can be traced without memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.checkpoints.build import abstract_weights
from model.config import ConfigError, ModelConfig
from model.presets import PRESETS, preset
from model.sharding import parse_mesh
from model.transformer import Transformer, causal_attend

# Parameter counts of the published checkpoints (the sum of their tensors' sizes).
PUBLISHED = {
    "llama-13b": 13_015_864_320,
    "llama2-7b": 6_738_415_616,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str):
    assert preset(name).parameter_count == PUBLISHED[name]


def test_kv_and_active_sizes():
    assert preset("llama3-70b").kv_bytes_per_token("bfloat16") == 320 * 1024  # Mooncake, section 5: 320 KB
    assert 12.8e9 < preset("mixtral-8x7b").active_parameter_count < 13e9  # "13B active" of its paper
    assert 3.2e9 < preset("qwen3-30b-a3b").active_parameter_count < 3.4e9  # "A3B"
    assert 21.5e9 < preset("qwen3-235b-a22b").active_parameter_count < 22.5e9  # "A22B"


def test_presets_survive_the_round_trip_through_hf():
    for config in PRESETS.values():
        assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("name", ["llama3-70b", "qwen3-30b-a3b"])
def test_a_large_model_is_laid_out_over_a_mesh_without_memory(name: str):
    config = preset(name)
    weights = abstract_weights(config, jnp.bfloat16, parse_mesh("tp:4"))
    assert sum(weight.size for weight in weights.values()) == config.parameter_count
    on_one_device = sum(np.prod(weight.sharding.shard_shape(weight.shape)) for weight in weights.values())
    # All but norms, and the router of a mixture, is split.
    assert on_one_device < config.parameter_count / 4 * 1.01


def test_a_large_model_is_traced_without_memory():
    config = preset("llama3-70b")
    model = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), jnp.bfloat16))

    graph, state = nnx.split(model)
    out = jax.eval_shape(
        lambda state, tokens: _last_logits(nnx.merge(graph, state), tokens), state, jnp.zeros(16, jnp.int32)
    )
    assert (out.shape, out.dtype) == ((1, 128_256), jnp.float32)


def _last_logits(model: Transformer, tokens: jax.Array) -> jax.Array:
    hidden, _ = model(tokens, jnp.arange(len(tokens)), causal_attend(model.config), None)
    return model.logits(hidden[-1:])


def test_an_unknown_preset_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"`zephyr`; known: bench-58m"):
        preset("zephyr")


def test_a_preset_that_is_mistyped_is_suggested():
    with pytest.raises(ConfigError, match=r"No preset `llama3-7b`; did you mean `llama3-70b`\? Known: bench-58m"):
        preset("llama3-7b")
