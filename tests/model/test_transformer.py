"""What the transformer means, whatever its weights: causality, caching, windows, splitting, sizes."""

import dataclasses

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
}


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return VARIANTS[request.param]


def _positions(tokens: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[-1]), tokens.shape)


def _cached_attend(config: ModelConfig):
    """Attention of one new token over all cached ones, spelled out; `kv` maps layer to ([S, KH, D], [S, KH, D])."""

    def attend(layer, q, k, v, kv):
        if layer in kv:
            k, v = jnp.concatenate([kv[layer][0], k]), jnp.concatenate([kv[layer][1], v])
        kv = {**kv, layer: (k, v)}
        window = config.window(layer)
        if window is not None:
            k, v = k[-window:], v[-window:]
        group = config.num_heads // config.num_kv_heads
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        scores = jnp.einsum("qhd,shd->hqs", q, k) / config.head_dim**0.5
        return jnp.einsum("hqs,shd->qhd", jax.nn.softmax(scores, axis=-1), v), kv

    return attend


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

    gradient = jax.grad(hidden_at_query)(model.embed_tokens.weight[...])[: len(tokens)]
    seen = np.asarray(jnp.any(gradient != 0, axis=-1))
    first = 0 if config.sliding_window is None else query - config.sliding_window + 1
    assert seen.tolist() == [first <= position <= query for position in range(len(tokens))]


def test_decoding_token_by_token_equals_one_forward_pass(config: ModelConfig):
    model = Transformer(config, nnx.Rngs(1))
    tokens = jax.random.randint(jax.random.key(0), (9,), 0, config.vocab_size)
    whole, _ = model(tokens, _positions(tokens), causal_attend(config), None)
    kv, steps = {}, []
    for position in range(len(tokens)):
        hidden, kv = model(
            tokens[position : position + 1], jnp.array([position], jnp.int32), _cached_attend(config), kv
        )
        steps.append(hidden)
    np.testing.assert_allclose(
        model.logits(jnp.concatenate(steps)), model.logits(whole), atol=2e-6
    )  # a few ulp of float32 logits of order 1, summed in another order


def test_batch_axes_are_the_callers(config: ModelConfig):
    model = Transformer(config, nnx.Rngs(2))
    tokens = jax.random.randint(jax.random.key(0), (2, 6), 0, config.vocab_size)
    batched, _ = model(tokens, _positions(tokens), causal_attend(config), None)
    for row in range(2):
        alone, _ = model(tokens[row], _positions(tokens[row]), causal_attend(config), None)
        np.testing.assert_allclose(batched[row], alone, atol=2e-6)


def test_split_and_merge_are_inverse(config: ModelConfig):
    model = Transformer(config, nnx.Rngs(3))
    definition, weights = split(model)
    assert hash(definition) == hash(split(model)[0])
    assert definition == split(Transformer(config, nnx.Rngs(4)))[0]
    tokens = jnp.arange(4, dtype=jnp.int32)
    expected, _ = model(tokens, _positions(tokens), causal_attend(config), None)
    actual, _ = merge(definition, weights)(tokens, _positions(tokens), causal_attend(config), None)
    np.testing.assert_array_equal(actual, expected)


def test_the_config_counts_the_parameters(config: ModelConfig):
    _, weights = split(Transformer(config, nnx.Rngs(0)))
    assert sum(weight.size for weight in weights) == config.parameter_count


def test_one_row_in_bfloat16_equals_two():
    model = Transformer(TINY, nnx.Rngs(0), dtype=jnp.bfloat16)
    hidden = jax.random.normal(jax.random.key(0), (2, TINY.hidden_size), jnp.bfloat16)
    both = jax.jit(model.logits)(hidden)
    assert both.dtype == jnp.float32
    np.testing.assert_array_equal(jax.jit(model.logits)(hidden[:1]), both[:1])
