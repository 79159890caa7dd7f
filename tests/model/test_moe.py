"""The mixture of experts against the plain sum over experts that it is short for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig
from model.moe import MixtureOfExperts, block_by_expert

CONFIG = ModelConfig(
    model_type="mixtral",
    vocab_size=11,
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    num_experts=5,
    experts_per_token=2,
    moe_intermediate_size=24,
)


@pytest.mark.parametrize("tokens", [1, 3, 40, 400])
def test_equals_the_weighted_sum_over_chosen_experts(tokens: int):
    mixture = MixtureOfExperts(nnx.Rngs(0), CONFIG, jnp.dtype(jnp.float32), 0.02)
    x = jax.random.normal(jax.random.key(1), (tokens, 16))
    probabilities = np.asarray(jax.nn.softmax(x @ mixture.gate.weight[...].T, axis=-1))
    # A random router is nearly undecided; what matters here is that both sides pick the same two.
    chosen = np.argsort(-probabilities, axis=-1, kind="stable")[:, :2]
    experts = mixture.experts
    expected = np.zeros((tokens, 16), np.float32)
    for expert in range(CONFIG.num_experts):
        weight = np.where(chosen == expert, np.take_along_axis(probabilities, chosen, axis=1), 0).sum(axis=1)
        weight /= np.take_along_axis(probabilities, chosen, axis=1).sum(axis=1)
        inner = jax.nn.silu(x @ experts.gate_proj[expert].T) * (x @ experts.up_proj[expert].T)
        expected += weight[:, None] * np.asarray(inner @ experts.down_proj[expert].T)
    np.testing.assert_allclose(jax.jit(mixture)(x), expected, atol=1e-6)


_blocks = jax.jit(block_by_expert, static_argnums=1)


@settings(max_examples=30)
@given(st.data())
def test_blocks_hold_every_pair_once_under_its_own_expert(data: st.DataObject):
    num_experts, k = data.draw(st.sampled_from([(1, 1), (4, 2), (6, 6)]))
    tokens = data.draw(st.sampled_from([1, 3, 33]))
    skew = data.draw(st.floats(0.2, 3.0))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    popularity = np.arange(1, num_experts + 1) ** skew
    chosen = np.argsort(rng.gumbel(size=(tokens, num_experts)) + np.log(popularity), axis=1)[:, :k].astype(np.int32)
    slots, token_of_row, expert_of_block = map(np.asarray, _blocks(jnp.asarray(chosen), num_experts))
    rows = token_of_row.shape[1]
    assert len(np.unique(slots)) == chosen.size
    np.testing.assert_array_equal(expert_of_block[slots // rows], chosen)
    np.testing.assert_array_equal(token_of_row.reshape(-1)[slots], np.repeat(np.arange(tokens)[:, None], k, axis=1))
