"""Decoding steps written in many ways, each with its arguments and their roles."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attention_offload.converter import Role
from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache
from model.config import ModelConfig
from model.transformer import Transformer, split
from serving.engine.batch import StepInputs
from serving.engine.buckets import Bucket
from serving.engine.step import compute_step

BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 3, 16, 4, 2, 8, 32, 50


@dataclasses.dataclass(frozen=True)
class Step:
    """A step with arguments and roles; `crossing_bytes` is what one layer must send there and back."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    roles: tuple[Any, ...]
    layers: int
    crossing_bytes: int


def _crossing_bytes(batch: int, heads: int, kv_heads: int, head_dim: int, itemsize: int) -> int:
    """(2 + 2/G) e B d: queries, keys and values there, the result back (Lamina, section 3.2)."""
    return itemsize * batch * head_dim * (2 * heads + 2 * kv_heads)


def _random(rng: np.random.Generator, dtype: Any, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape) * 0.2, dtype)


def _rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    frequencies = jnp.exp(-jnp.arange(HEAD_DIM // 2, dtype=jnp.float32) / HEAD_DIM)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None]
    cos, sin = jnp.cos(angles)[:, None].astype(x.dtype), jnp.sin(angles)[:, None].astype(x.dtype)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def _norm(x: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _written_out(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    grouped = q.reshape(-1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
    scores = jnp.einsum("bkgd,bskd->bkgs", grouped, k).astype(jnp.float32) / HEAD_DIM**0.5
    seen = (jnp.arange(LENGTH)[None] <= positions[:, None])[:, None, None]
    scores = jnp.where(seen, scores, -1e30)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True)).astype(q.dtype)
    return jnp.einsum("bkgs,bskd->bkgd", weights, v).reshape(-1, HEADS * HEAD_DIM)


def _library(q: jax.Array, k: jax.Array, v: jax.Array, positions: jax.Array) -> jax.Array:
    seen = (jnp.arange(LENGTH)[None] <= positions[:, None])[:, None, None]
    return jax.nn.dot_product_attention(q[:, None], k, v, mask=seen).reshape(-1, HEADS * HEAD_DIM)


def _attention(w: Any, x: jax.Array, cache: Any, positions: jax.Array, attend: Callable[..., jax.Array]) -> Any:
    rows = jnp.arange(x.shape[0])
    q, k, v = (
        (x @ w[name]).reshape(-1, heads, HEAD_DIM) for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))
    )
    keys = cache[0].at[rows, positions].set(_rope(k, positions))
    values = cache[1].at[rows, positions].set(v)
    return attend(_rope(q, positions), keys, values, positions) @ w["o"], (keys, values)


def _mlp(w: Any, x: jax.Array) -> jax.Array:
    return jax.nn.silu(x @ w["up"]) @ w["down"]


def _pre_norm(w: Any, x: jax.Array, cache: Any, positions: jax.Array, attend: Any = _written_out) -> Any:
    out, cache = _attention(w, _norm(x), cache, positions, attend)
    x = x + out
    return x + _mlp(w, _norm(x)), cache


def _post_norm(w: Any, x: jax.Array, cache: Any, positions: jax.Array) -> Any:
    out, cache = _attention(w, x, cache, positions, _written_out)
    x = _norm(x + out)
    return _norm(x + _mlp(w, x)), cache


def _parallel(w: Any, x: jax.Array, cache: Any, positions: jax.Array) -> Any:
    normed = _norm(x)
    out, cache = _attention(w, normed, cache, positions, _written_out)
    return (x + _mlp(w, normed)) + out, cache


def _layer_weights(rng: np.random.Generator, dtype: Any) -> dict[str, jax.Array]:
    shapes = {
        "q": (WIDTH, HEADS * HEAD_DIM),
        "k": (WIDTH, KV_HEADS * HEAD_DIM),
        "v": (WIDTH, KV_HEADS * HEAD_DIM),
        "o": (HEADS * HEAD_DIM, WIDTH),
        "up": (WIDTH, 2 * WIDTH),
        "down": (2 * WIDTH, WIDTH),
    }
    return {name: _random(rng, dtype, *shape) for name, shape in shapes.items()}


def written_by_hand(block: Callable[..., Any] = _pre_norm, layers: int = 2, dtype: Any = jnp.float32) -> Step:
    """GQA with RoPE and a scatter into per-layer caches."""

    def function(weights: Any, caches: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        x, kept = weights["embed"][tokens], []
        for w, cache in zip(weights["layers"], caches, strict=True):
            x, cache = block(w, x, cache, positions)
            kept.append(cache)
        return (x @ weights["embed"].T).astype(jnp.float32), kept

    return _step(function, layers, dtype)


def scanned(layers: int = 2, dtype: Any = jnp.float32) -> Step:
    """The same layers as one scan over stacked weights and stacked caches."""

    def function(weights: Any, caches: Any, tokens: jax.Array, positions: jax.Array) -> Any:
        def body(x: jax.Array, layer: Any) -> Any:
            return _pre_norm(layer[0], x, layer[1], positions)

        x, kept = jax.lax.scan(body, weights["embed"][tokens], (weights["layers"], caches))
        return (x @ weights["embed"].T).astype(jnp.float32), kept

    step = _step(function, layers, dtype)
    weights, caches, tokens, positions = step.args
    stacked = {name: jnp.stack([w[name] for w in weights["layers"]]) for name in weights["layers"][0]}
    pools = tuple(jnp.stack([cache[i] for cache in caches]) for i in range(2))
    args = ({"embed": weights["embed"], "layers": stacked}, pools, tokens, positions)
    return dataclasses.replace(step, args=args)


def _step(function: Callable[..., Any], layers: int, dtype: Any) -> Step:
    rng = np.random.default_rng(0)
    weights = {
        "embed": _random(rng, dtype, VOCAB, WIDTH),
        "layers": [_layer_weights(rng, dtype) for _ in range(layers)],
    }
    pool = (BATCH, LENGTH, KV_HEADS, HEAD_DIM)
    caches = [(_random(rng, dtype, *pool), _random(rng, dtype, *pool)) for _ in range(layers)]
    tokens, positions = jnp.array([1, 2, 3], jnp.int32), jnp.array([4, 0, 15], jnp.int32)
    return Step(
        function=function,
        args=(weights, caches, tokens, positions),
        roles=(Role.WEIGHT, Role.KV, Role.ACTIVATION, Role.FREE),
        layers=layers,
        crossing_bytes=_crossing_bytes(BATCH, HEADS, KV_HEADS, HEAD_DIM, jnp.dtype(dtype).itemsize),
    )


class _LinenModel(nn.Module):
    layers: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(self.layers):
            normed = nn.LayerNorm(dtype=self.dtype)(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS, decode=True, dtype=self.dtype)(normed)
            x = x + nn.Dense(WIDTH, dtype=self.dtype)(nn.gelu(nn.Dense(2 * WIDTH, dtype=self.dtype)(x)))
        return x


def linen(layers: int = 2, dtype: Any = jnp.float32) -> Step:
    """Flax Linen's own decoding attention; its cache indices are known to both sides."""
    model = _LinenModel(layers, dtype)
    variables = model.init(jax.random.key(0), jnp.zeros((BATCH, LENGTH, WIDTH), dtype))
    params, caches = variables["params"], variables["cache"]

    def function(params: Any, caches: Any, x: jax.Array) -> Any:
        return model.apply({"params": params, "cache": caches}, x, mutable=["cache"])

    roles = jax.tree.map(lambda leaf: Role.KV if leaf.ndim else Role.FREE, caches)
    x = _random(np.random.default_rng(1), dtype, BATCH, 1, WIDTH)
    return Step(
        function=function,
        args=(params, caches, x),
        roles=(Role.WEIGHT, roles, Role.ACTIVATION),
        layers=layers,
        crossing_bytes=_crossing_bytes(BATCH, HEADS, HEADS, WIDTH // HEADS, jnp.dtype(dtype).itemsize),
    )


class _NnxModel(nnx.Module):
    def __init__(self, layers: int, dtype: Any, rngs: nnx.Rngs) -> None:
        self.attentions = nnx.List(
            [
                nnx.MultiHeadAttention(HEADS, WIDTH, decode=True, dtype=dtype, param_dtype=dtype, rngs=rngs)
                for _ in range(layers)
            ]
        )
        self.dense = nnx.List(
            [nnx.Linear(WIDTH, WIDTH, dtype=dtype, param_dtype=dtype, rngs=rngs) for _ in range(layers)]
        )
        for attention in self.attentions:
            attention.init_cache((BATCH, LENGTH, WIDTH), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        for attention, dense in zip(self.attentions, self.dense, strict=True):
            x = x + attention(x)
            x = x + nnx.gelu(dense(x))
        return x


def nnx_attention(layers: int = 2, dtype: Any = jnp.float32) -> Step:
    """Flax NNX's own decoding attention."""
    graph, params, caches, rest = nnx.split(_NnxModel(layers, dtype, nnx.Rngs(0)), nnx.Param, nnx.Cache, ...)

    def function(params: Any, caches: Any, x: jax.Array) -> Any:
        model = nnx.merge(graph, params, caches, rest)
        out = model(x)
        return out, nnx.state(model, nnx.Cache)

    roles = jax.tree.map(lambda leaf: Role.KV if leaf.ndim else Role.FREE, caches)
    x = _random(np.random.default_rng(1), dtype, BATCH, 1, WIDTH)
    return Step(
        function=function,
        args=(params, caches, x),
        roles=(Role.WEIGHT, roles, Role.ACTIVATION),
        layers=layers,
        crossing_bytes=_crossing_bytes(BATCH, HEADS, HEADS, WIDTH // HEADS, jnp.dtype(dtype).itemsize),
    )


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 24},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mixtral": {"num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 32},
    "qwen3_moe": {"num_experts": 4, "experts_per_token": 2, "moe_intermediate_size": 32, "qk_norm": True},
}


def engine_step(family: str, layers: int = 2, dtype: Any = jnp.float32, bucket: Bucket = Bucket(4, 0, 0)) -> Step:  # noqa: B008
    """The engine's own step over a paged pool."""
    config = ModelConfig(
        model_type=family,
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_layers=layers,
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=16,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=128,
        tie_embeddings=True,
        **FAMILIES[family],
    )
    definition, weights = split(Transformer(config, nnx.Rngs(0), dtype))
    layout = KVLayout(
        num_layers=layers,
        num_pages=8,
        page_size=8,
        num_kv_heads=KV_HEADS,
        head_dim=16,
        dtype=jnp.dtype(dtype).name,
    )
    rows, tokens = bucket.rows, bucket.tokens
    inputs = StepInputs(
        tokens=jnp.arange(1, tokens + 1, dtype=jnp.int32),
        positions=jnp.zeros(tokens, jnp.int32),
        slots=jnp.arange(tokens, dtype=jnp.int32) * 8,
        page_table=jnp.arange(rows, dtype=jnp.int32)[:, None],
        lengths=jnp.ones(rows, jnp.int32),
        prefill_starts=jnp.zeros(1, jnp.int32),
        last=jnp.arange(rows, dtype=jnp.int32),
    )
    free = {field.name: Role.FREE for field in dataclasses.fields(StepInputs)}
    return Step(
        function=functools.partial(compute_step, definition, config, None, bucket, None),
        args=(weights, PagedKVCache.create(layout), inputs),
        roles=(Role.WEIGHT, Role.KV, StepInputs(**(free | {"tokens": Role.ACTIVATION}))),
        layers=layers,
        crossing_bytes=_crossing_bytes(tokens, HEADS, KV_HEADS, 16, jnp.dtype(dtype).itemsize),
    )


FOREIGN: dict[str, Callable[..., Step]] = {
    "einsum": written_by_hand,
    "dot_product_attention": functools.partial(written_by_hand, functools.partial(_pre_norm, attend=_library)),
    "post_norm": functools.partial(written_by_hand, _post_norm),
    "parallel_residual": functools.partial(written_by_hand, _parallel),
    "scan_over_layers": scanned,
    "linen": linen,
    "nnx": nnx_attention,
}
