"""Mixture of experts: a router picks `experts_per_token` SwiGLUs for each token (Mixtral, arXiv:2401.04088; Qwen3-MoE).

No token is dropped and no expert has a capacity. Tokens are sorted by expert and cut into blocks of one expert each,
which `grouped_linear` multiplies by that expert's weights; it reads the weights of routed experts only. On XLA:CPU,
`lax.ragged_dot` multiplies every token by every expert instead and is 5 to 50 times slower (model/NOTES.md).
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from model.config import ModelConfig
from model.kernels.linear import grouped_linear
from model.layers import Linear, normal

MAX_BLOCK = 64
"""Rows of a block; more would be mostly padding unless each expert gets hundreds of tokens."""


class Experts(nnx.Module):
    """The stacked weights of all experts: `gate_proj`, `up_proj` [E, intermediate, hidden], `down_proj` [E, h, i]."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, dtype: jnp.dtype, output_scale: float):
        E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj = nnx.Param(normal(0.02)(rngs.params(), (E, F, D), dtype), axes=("experts", "mlp", "embed"))
        self.up_proj = nnx.Param(normal(0.02)(rngs.params(), (E, F, D), dtype), axes=("experts", "mlp", "embed"))
        self.down_proj = nnx.Param(
            normal(output_scale)(rngs.params(), (E, D, F), dtype), axes=("experts", "embed", "mlp")
        )

    def __call__(self, blocks: jax.Array, experts: jax.Array) -> jax.Array:
        """Runs each block [N, rows, hidden] through its expert (int32 [N])."""
        gate = grouped_linear(blocks, self.gate_proj[...], experts)
        inner = jax.nn.silu(gate) * grouped_linear(blocks, self.up_proj[...], experts)
        return grouped_linear(inner, self.down_proj[...], experts).astype(blocks.dtype)


class MixtureOfExperts(nnx.Module):
    """[*batch, hidden] to the same; the softmax of the router is over all experts, in float32."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, dtype: jnp.dtype, output_scale: float):
        self.gate = Linear(rngs, config.hidden_size, config.num_experts, axes=("experts", "embed"), dtype=dtype)
        self.experts = Experts(rngs, config, dtype, output_scale)
        self.num_experts = config.num_experts
        self.experts_per_token = config.experts_per_token
        self.normalize = config.norm_topk_prob

    def __call__(self, x: jax.Array) -> jax.Array:
        flat = x.reshape(-1, x.shape[-1])
        probabilities = jax.nn.softmax(self.gate(flat).astype(jnp.float32), axis=-1)
        weights, chosen = lax.top_k(probabilities, self.experts_per_token)
        if self.normalize:
            weights /= jnp.sum(weights, axis=-1, keepdims=True)
        slots, tokens, experts = block_by_expert(chosen, self.num_experts)
        out = self.experts(flat[tokens], experts).reshape(-1, flat.shape[-1])
        out = jnp.sum(out[slots].astype(jnp.float32) * weights[..., None], axis=1)
        return out.astype(x.dtype).reshape(x.shape)


def block_by_expert(chosen: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lays (token, expert) pairs out in blocks of equal size that hold one expert each.

    Args:
      chosen: int32 [T, k], the experts of each token.

    Returns:
      slots: int32 [T, k], where each pair lies in the N * rows rows of the blocks.
      tokens: int32 [N, rows], the token in each row; padding rows repeat token 0.
      experts: int32 [N], the expert of each block. N is the most blocks that any routing needs.
    """
    pairs = chosen.size
    rows = min(MAX_BLOCK, 1 << max(0, (pairs // num_experts).bit_length() - 1))
    num_blocks = min(pairs, pairs // rows + num_experts)
    expert_of_pair = chosen.reshape(-1)
    order = jnp.argsort(expert_of_pair, stable=True)
    sizes = jnp.zeros(num_experts, jnp.int32).at[expert_of_pair].add(1)
    blocks = (sizes + rows - 1) // rows
    ends = jnp.cumsum(blocks)
    shift = (ends - blocks) * rows - (jnp.cumsum(sizes) - sizes)
    sorted_slots = jnp.arange(pairs, dtype=jnp.int32) + shift[expert_of_pair[order]]
    slots = jnp.zeros(pairs, jnp.int32).at[order].set(sorted_slots)
    tokens = jnp.zeros(num_blocks * rows, jnp.int32).at[sorted_slots].set(order // chosen.shape[1])
    experts = jnp.searchsorted(ends, jnp.arange(num_blocks), side="right", method="compare_all").astype(jnp.int32)
    experts = jnp.minimum(experts, num_experts - 1)
    return slots.reshape(chosen.shape), tokens.reshape(num_blocks, rows), experts
