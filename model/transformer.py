"""The decoder-only transformer of Llama, Mistral, Qwen2, Qwen3, Mixtral and Qwen3-MoE, as Flax NNX modules.

Attention and the KV cache are not in here: the caller passes an `attend`, which is handed each layer's rotated queries,
keys and values and returns what attention makes of them. Training, paged serving and attention on other devices are
three `attend`s over one model. Module and parameter names are those of Hugging Face checkpoints.

On hot paths use `split` once and `jax.jit` over the flat tuple of weights: nnx.jit walks the module tree in Python at
every call, which costs a hundred times more per decode step.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from model.config import ModelConfig
from model.layers import Embedding, Linear, RMSNorm, SwiGLU, matmul
from model.moe import MixtureOfExperts
from model.rope import rotary, rotate

Attend = Callable[[int, jax.Array, jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""`attend(layer, q, k, v, kv) -> (out, kv)`.

q and out [*batch, heads, head_dim]; k and v [*batch, kv_heads, head_dim], RoPE and QK norm applied; `kv` is whatever
the caller threads through the layers (a paged cache; None in training). `ModelConfig.window(layer)` says how far back
to look.
"""


class Attention(nnx.Module):
    """Projections, QK norm and RoPE around `attend`: [*batch, hidden] to the same."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, dtype: jnp.dtype, output_scale: float):
        hidden, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        bias = config.qkv_bias
        self.q_proj = Linear(rngs, hidden, heads * head_dim, axes=("heads", "embed"), dtype=dtype, bias=bias)
        self.k_proj = Linear(rngs, hidden, kv_heads * head_dim, axes=("kv_heads", "embed"), dtype=dtype, bias=bias)
        self.v_proj = Linear(rngs, hidden, kv_heads * head_dim, axes=("kv_heads", "embed"), dtype=dtype, bias=bias)
        self.o_proj = Linear(
            rngs,
            heads * head_dim,
            hidden,
            axes=("embed", "heads"),
            dtype=dtype,
            bias=config.output_bias,
            scale=output_scale,
        )
        self.q_norm = RMSNorm(head_dim, "head_dim", dtype, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(head_dim, "head_dim", dtype, config.rms_norm_eps) if config.qk_norm else None
        self.head_dim = head_dim

    def __call__(
        self, layer: int, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], attend: Attend, kv: Any
    ) -> tuple[jax.Array, Any]:
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = self.q_proj(x).reshape(heads), self.k_proj(x).reshape(heads), self.v_proj(x).reshape(heads)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out, kv = attend(layer, rotate(q, cos_sin), rotate(k, cos_sin), v, kv)
        return self.o_proj(out.reshape(*x.shape[:-1], -1)), kv


class Layer(nnx.Module):
    """One pre-norm residual layer: attention, then the MLP."""

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, layer: int, dtype: jnp.dtype):
        # GPT-2's initialisation: what is added to the residual stream shrinks with the number of additions.
        output_scale = 0.02 / (2 * config.num_layers) ** 0.5
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(hidden, "embed", dtype, eps)
        self.self_attn = Attention(rngs, config, dtype, output_scale)
        self.post_attention_layernorm = RMSNorm(hidden, "embed", dtype, eps)
        self.mlp = (
            MixtureOfExperts(rngs, config, dtype, output_scale)
            if config.is_sparse(layer)
            else SwiGLU(rngs, hidden, config.intermediate_size, dtype=dtype, output_scale=output_scale)
        )

    def __call__(
        self, layer: int, x: jax.Array, cos_sin: tuple[jax.Array, jax.Array], attend: Attend, kv: Any
    ) -> tuple[jax.Array, Any]:
        out, kv = self.self_attn(layer, self.input_layernorm(x), cos_sin, attend, kv)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), kv


class Transformer(nnx.Module):
    """A decoder-only transformer; weights and activations share one dtype, sums and logits are float32.

    Args:
      config: the shape.
      rngs: seeds of the initial weights (`nnx.Rngs(0)`). Do not jit the constructor: unrolled, it compiles for minutes.
      dtype: of the weights.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        dtype = jnp.dtype(dtype)
        self.config = config
        self.embed_tokens = Embedding(rngs, config.vocab_size, config.hidden_size, dtype)
        self.layers = nnx.List([Layer(rngs, config, layer, dtype) for layer in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, "embed", dtype, config.rms_norm_eps)
        self.lm_head = (
            None
            if config.tie_embeddings
            else Linear(rngs, config.hidden_size, config.vocab_size, axes=("vocab", "embed"), dtype=dtype)
        )

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend, kv: Any) -> tuple[jax.Array, Any]:
        """Runs every layer.

        Args:
          tokens: int32 [*batch].
          positions: int32 [*batch], of each token within its own sequence; RoPE rotates by them.
          attend: attention, and the owner of the KV cache.
          kv: handed to `attend` of the first layer, and on from layer to layer.

        Returns:
          Normalised hidden states [*batch, hidden_size] (for `logits`), and the last layer's `kv`.
        """
        x = self.embed_tokens(tokens)
        cos_sin = rotary(self.config.rope, self.config.head_dim, positions)
        for index, layer in enumerate(self.layers):
            x, kv = layer(index, x, cos_sin, attend, kv)
        return self.norm(x), kv

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [*rows, vocab_size] of the hidden states [*rows, hidden_size] that are worth the matmul."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return matmul(hidden, head.weight[...])


def causal_attend(config: ModelConfig) -> Attend:
    """Dense causal attention within each sequence of a batch [*batch, tokens, heads, head_dim]; `kv` passes through."""

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, kv: Any) -> tuple[jax.Array, Any]:
        window = config.window(layer)
        local = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local), kv

    return attend


@dataclasses.dataclass(frozen=True)
class Definition:
    """All of a model but its weights; hashable, so it can be a static argument of jit."""

    graph: nnx.GraphDef
    tree: Any


def split(model: Transformer) -> tuple[Definition, tuple[jax.Array, ...]]:
    """A model as a static definition and the flat tuple of its weights, the cheapest thing to pass to a jitted step."""
    graph, state = nnx.split(model)
    leaves, tree = jax.tree.flatten(state)
    return Definition(graph, tree), tuple(leaves)


def merge(definition: Definition, weights: tuple[jax.Array, ...]) -> Transformer:
    """The inverse of `split`; free inside jit."""
    return nnx.merge(definition.graph, jax.tree.unflatten(definition.tree, weights))
