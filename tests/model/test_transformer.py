"""What the transformer means, whatever its weights: causality, caching, windows, splitting, sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from model.config import ModelConfig
from model.transformer import Transformer, causal_attend, merge, split

TINY = ModelConfig(
    model_type="llama",
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
VARIANTS = {
    "llama": TINY,
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "window": dataclasses.replace(TINY, model_type="mistral", sliding_window=3),
    "bias": dataclasses.replace(TINY, model_type="qwen2", qkv_bias=True, output_bias=True),
    "qk_norm": dataclasses.replace(TINY, model_type="qwen3", qk_norm=True),
    "experts": dataclasses.replace(
        TINY,
        model_type="qwen3_moe",
        num_experts=4,
        experts_per_token=2,
        moe_intermediate_size=24,
        dense_mlp_layers=(0,),
    ),
}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return VARIANTS[request.param]


def _positions(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)


@functools.partial(jax.jit, static_argnums=0)
def _forward(definition, weights, tokens):
    model = merge(definition, weights)
    return model(tokens, _positions(tokens), causal_attend(model.config), None)[0]


@functools.partial(jax.jit, static_argnums=0)
def _decode_step(definition, weights, token, position, kv):
    """One token against a dense cache of K and V [layers, S, kv_heads, head_dim], attention spelled out."""
    model = merge(definition, weights)
    config = model.config

    def attend(layer, q, k, v, kv):
        keys, values = kv[0].at[layer, position].set(k[0]), kv[1].at[layer, position].set(v[0])
        group = config.num_heads // config.num_kv_heads
        k, v = jnp.repeat(keys[layer], group, axis=1), jnp.repeat(values[layer], group, axis=1)
        scores = jnp.einsum("qhd,shd->hqs", q, k) / config.head_dim**0.5
        age = position - jnp.arange(k.shape[0])
        visible = (age >= 0) & (age < (config.window(layer) or k.shape[0]))
        scores = jnp.where(jnp.broadcast_to(visible, scores.shape), scores, -jnp.inf)
        return jnp.einsum("hqs,shd->qhd", jax.nn.softmax(scores, axis=-1), v), (keys, values)

    return model(token[None], position[None], attend, kv)


def test_a_token_depends_on_exactly_the_tokens_it_may_see(config: ModelConfig):
    config = dataclasses.replace(config, num_layers=1)
    model = Transformer(config, nnx.Rngs(0))
    tokens = jnp.arange(8, dtype=jnp.int32)
    definition, weights = split(model)
    query = 5

    def hidden_at_query(embedding: jax.Array) -> jax.Array:
        # One row of the embedding per position, so its gradient is the gradient with respect to that position's input.
        model = merge(definition, weights)
        model.embed_tokens.weight[...] = embedding
        hidden, _ = model(tokens, _positions(tokens), causal_attend(config), None)
        return jnp.sum(hidden[query] * jnp.cos(jnp.arange(config.hidden_size)))

    gradient = jax.jit(jax.grad(hidden_at_query))(model.embed_tokens.weight[...])[: len(tokens)]
    seen = np.asarray(jnp.any(gradient != 0, axis=-1))
    first = 0 if config.sliding_window is None else query - config.sliding_window + 1
    assert seen.tolist() == [first <= position <= query for position in range(len(tokens))]


def test_decoding_token_by_token_equals_one_forward_pass(config: ModelConfig):
    model = Transformer(config, nnx.Rngs(1))
    tokens = jax.random.randint(jax.random.key(0), (9,), 0, config.vocab_size)
    kv = (jnp.zeros((config.num_layers, 9, config.num_kv_heads, config.head_dim)),) * 2
    steps = []
    for position in range(9):
        hidden, kv = _decode_step(*split(model), tokens[position], jnp.int32(position), kv)
        steps.append(hidden)
    # A few ulp: float32 sums in another order.
    np.testing.assert_allclose(jnp.concatenate(steps), _forward(*split(model), tokens), atol=5e-6)


def test_batch_axes_are_the_callers(config: ModelConfig):
    weights = split(Transformer(config, nnx.Rngs(2)))
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, config.vocab_size)
    batched = _forward(*weights, tokens)
    for row in range(2):
        np.testing.assert_allclose(batched[row], _forward(*weights, tokens[row]), atol=5e-6)


def test_split_and_merge_are_inverse(config: ModelConfig):
    model = Transformer(config, nnx.Rngs(3))
    definition, weights = split(model)
    assert hash(definition) == hash(split(model)[0])
    assert definition == split(Transformer(config, nnx.Rngs(4)))[0]
    for leaf, again in zip(weights, split(merge(definition, weights))[1], strict=True):
        assert leaf is again


def test_the_config_counts_the_parameters(config: ModelConfig):
    _, weights = split(Transformer(config, nnx.Rngs(0)))
    assert sum(weight.size for weight in weights) == config.parameter_count


def test_one_row_in_bfloat16_equals_two():
    model = Transformer(TINY, nnx.Rngs(0), dtype=jnp.bfloat16)
    hidden = jax.random.normal(jax.random.key(0), (2, TINY.hidden_size), jnp.bfloat16)
    both = jax.jit(model.logits)(hidden)
    assert both.dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(model.logits)(hidden[:1]), both[:1])
