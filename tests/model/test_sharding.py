"""Tensor parallelism over CPU devices computes what one device computes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from model.config import ModelConfig
from model.sharding import KV_SPEC, MeshError, check_mesh, parse_mesh, shard_attend, shard_model, weight_sharding
from model.transformer import Transformer, split
from tests.model.paged import empty_pools, paged_step

CONFIG = ModelConfig(
    model_type="llama",
    vocab_size=67,  # A prime: the vocabulary stays whole.
    hidden_size=32,
    num_layers=1,
    num_heads=16,
    num_kv_heads=8,
    head_dim=4,
    intermediate_size=64,
)
FEATURES = dataclasses.replace(
    CONFIG,
    model_type="qwen3_moe",
    num_layers=2,
    vocab_size=64,
    qk_norm=True,
    qkv_bias=True,
    output_bias=True,
    tie_embeddings=True,
    sliding_window=3,
    num_experts=4,
    experts_per_token=2,
    moe_intermediate_size=16,
    dense_mlp_layers=(0,),
)


def _generate(model: Transformer, mesh: Mesh | None) -> jax.Array:
    """Logits [7, vocab] of a prefill of 5 tokens and two decode steps through the paged cache."""
    definition, weights = split(model)
    kv = empty_pools(model.config, 7)
    if mesh is not None:
        kv = jax.device_put(kv, NamedSharding(mesh, KV_SPEC))
    tokens = jnp.array([3, 1, 4, 1, 5, 9, 2], jnp.int32)
    logits = []
    for start, end in ((0, 5), (5, 6), (6, 7)):
        out, kv = paged_step(definition, weights, tokens[start:end], jnp.arange(start, end), kv, mesh)
        logits.append(out)
    assert mesh is None or kv.k.sharding.spec[1] == "tp"
    return np.concatenate(logits)


_on_one_device = functools.cache(lambda config: _generate(Transformer(config, nnx.Rngs(0)), None))


@pytest.mark.parametrize(("config", "size"), [(CONFIG, 2), (CONFIG, 4), (CONFIG, 8), (FEATURES, 4)])
def test_tensor_parallel_logits_equal_those_of_one_device(config: ModelConfig, size: int):
    mesh = parse_mesh(f"tp:{size}")
    sharded = shard_model(Transformer(config, nnx.Rngs(0)), mesh)
    q_proj = sharded.layers[0].self_attn.q_proj.weight[...]
    assert {shard.data.shape for shard in q_proj.addressable_shards} == {(64 // size, 32)}
    # Sums over heads and the MLP are split, so float32 rounds differently.
    np.testing.assert_allclose(_generate(sharded, mesh), _on_one_device(config), atol=5e-6)


def test_a_sharded_attend_sees_its_own_heads_and_the_whole_of_what_it_closes_over():
    mesh = parse_mesh("tp:4")
    pool = jax.device_put(jnp.arange(3 * 8 * 2, dtype=jnp.float32).reshape(3, 8, 2), NamedSharding(mesh, KV_SPEC))
    q, k = jnp.ones((5, 16, 2)), jnp.ones((5, 8, 2))

    @jax.jit
    def step(q, k, pool, table):
        def attend(layer, q, k, v, kv):
            assert (q.shape, k.shape, kv["pool"].shape) == ((5, 4, 2), (5, 2, 2), (3, 2, 2))
            return q * kv["pool"][table[0], 0, 0], {"pool": kv["pool"] + 1}

        return shard_attend(attend, mesh)(0, q, k, k, {"pool": pool})

    out, kv = step(q, k, pool, jnp.array([2]))
    np.testing.assert_array_equal(out[0, :, 0], np.repeat(np.asarray(pool)[2, ::2, 0], 4))
    np.testing.assert_array_equal(kv["pool"], pool + 1)
    assert kv["pool"].sharding.spec == PartitionSpec(None, "tp")


def test_a_mesh_that_does_not_divide_the_heads_is_refused_with_the_numbers():
    with pytest.raises(MeshError, match=r"over 3 devices does not divide 16 \(attention heads\), 8 \(KV heads\), 64"):
        check_mesh(CONFIG, parse_mesh("tp:3"))


@pytest.mark.parametrize("text", ["tp", "tp:0", "tp:x", "ep:2", "", "tp:2,"])
def test_a_malformed_mesh_is_refused(text: str):
    with pytest.raises(MeshError, match="axis:size"):
        parse_mesh(text)


def test_a_mesh_larger_than_the_machine_is_refused_with_the_numbers():
    with pytest.raises(MeshError, match=r"needs 64 devices and there are 8 \(cpu\)"):
        parse_mesh("tp:64")


def test_axes_that_do_not_divide_stay_whole():
    mesh = parse_mesh("dp:2,tp:4")
    assert weight_sharding(mesh, ("vocab", "embed"), (67, 32)).spec == PartitionSpec(None, None)
    assert weight_sharding(mesh, ("vocab", "embed"), (68, 32)).spec == PartitionSpec("tp", None)
