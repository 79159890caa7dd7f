"""Shapes of published models by name, for planning, simulation and benchmarks without their weights. No JAX here."""

import difflib
from collections.abc import Iterable

from model.config import ConfigError, ModelConfig, RopeConfig


def _llama3_rope(factor: float) -> RopeConfig:
    return RopeConfig(theta=500_000.0, kind="llama3", factor=factor, original_max_position_embeddings=8192)


_QWEN_ROPE = RopeConfig(theta=1_000_000.0)


def _config(
    model_type: str, vocab: int, hidden: int, layers: int, heads: tuple[int, int, int], intermediate: int, **fields
) -> ModelConfig:
    """`heads` is (query heads, KV heads, head_dim)."""
    num_heads, num_kv_heads, head_dim = heads
    return ModelConfig(
        model_type=model_type,
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        **fields,
    )


PRESETS: dict[str, ModelConfig] = {
    # The model of the CPU benchmarks: small enough for two cores, large enough to be bound by memory.
    "bench-58m": _config("llama", 32_000, 512, 8, (8, 4, 64), 1536, max_position_embeddings=4096),
    "llama-13b": _config("llama", 32_000, 5120, 40, (40, 40, 128), 13_824),
    "llama-33b": _config("llama", 32_000, 6656, 60, (52, 52, 128), 17_920),
    "llama-65b": _config("llama", 32_000, 8192, 80, (64, 64, 128), 22_016, rms_norm_eps=1e-5),
    "llama2-7b": _config(
        "llama", 32_000, 4096, 32, (32, 32, 128), 11_008, rms_norm_eps=1e-5, max_position_embeddings=4096
    ),
    "llama2-70b": _config(
        "llama", 32_000, 8192, 80, (64, 8, 128), 28_672, rms_norm_eps=1e-5, max_position_embeddings=4096
    ),
    "llama3-8b": _config(
        "llama",
        128_256,
        4096,
        32,
        (32, 8, 128),
        14_336,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500_000.0),
        max_position_embeddings=8192,
    ),
    "llama3-70b": _config(
        "llama",
        128_256,
        8192,
        80,
        (64, 8, 128),
        28_672,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=500_000.0),
        max_position_embeddings=8192,
    ),
    "llama3.1-8b": _config(
        "llama",
        128_256,
        4096,
        32,
        (32, 8, 128),
        14_336,
        rms_norm_eps=1e-5,
        rope=_llama3_rope(8.0),
        max_position_embeddings=131_072,
    ),
    "llama3.2-1b": _config(
        "llama",
        128_256,
        2048,
        16,
        (32, 8, 64),
        8192,
        rms_norm_eps=1e-5,
        rope=_llama3_rope(32.0),
        max_position_embeddings=131_072,
        tie_embeddings=True,
    ),
    "mistral-7b": _config(
        "mistral",
        32_000,
        4096,
        32,
        (32, 8, 128),
        14_336,
        rms_norm_eps=1e-5,
        max_position_embeddings=32_768,
        sliding_window=4096,
    ),
    "mixtral-8x7b": _config(
        "mixtral",
        32_000,
        4096,
        32,
        (32, 8, 128),
        14_336,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1_000_000.0),
        max_position_embeddings=32_768,
        num_experts=8,
        experts_per_token=2,
        moe_intermediate_size=14_336,
    ),
    "qwen2.5-0.5b": _config(
        "qwen2",
        151_936,
        896,
        24,
        (14, 2, 64),
        4864,
        rope=_QWEN_ROPE,
        max_position_embeddings=32_768,
        qkv_bias=True,
        tie_embeddings=True,
    ),
    "qwen2.5-7b": _config(
        "qwen2", 152_064, 3584, 28, (28, 4, 128), 18_944, rope=_QWEN_ROPE, max_position_embeddings=32_768, qkv_bias=True
    ),
    "qwen2.5-72b": _config(
        "qwen2", 152_064, 8192, 80, (64, 8, 128), 29_568, rope=_QWEN_ROPE, max_position_embeddings=32_768, qkv_bias=True
    ),
    "qwen3-0.6b": _config(
        "qwen3",
        151_936,
        1024,
        28,
        (16, 8, 128),
        3072,
        rope=_QWEN_ROPE,
        max_position_embeddings=40_960,
        qk_norm=True,
        tie_embeddings=True,
    ),
    "qwen3-8b": _config(
        "qwen3", 151_936, 4096, 36, (32, 8, 128), 12_288, rope=_QWEN_ROPE, max_position_embeddings=40_960, qk_norm=True
    ),
    "qwen3-30b-a3b": _config(
        "qwen3_moe",
        151_936,
        2048,
        48,
        (32, 4, 128),
        6144,
        rope=_QWEN_ROPE,
        max_position_embeddings=40_960,
        qk_norm=True,
        num_experts=128,
        experts_per_token=8,
        moe_intermediate_size=768,
    ),
    "qwen3-235b-a22b": _config(
        "qwen3_moe",
        151_936,
        4096,
        94,
        (64, 4, 128),
        12_288,
        rope=_QWEN_ROPE,
        max_position_embeddings=40_960,
        qk_norm=True,
        num_experts=128,
        experts_per_token=8,
        moe_intermediate_size=1536,
    ),
}


def preset(name: str) -> ModelConfig:
    """Returns the shape of that name. Raises `ConfigError` with the names there are, the most alike first."""
    if name not in PRESETS:
        raise ConfigError(f"No preset `{name}`{suggestion(name)}.")
    return PRESETS[name]


def suggestion(name: str, names: Iterable[str] = PRESETS) -> str:
    """Returns how an error about the unknown `name` goes on: which of `names` it is most like, and all of them."""
    known = list(names)
    near = difflib.get_close_matches(name, known, n=1)
    return (f"; did you mean `{near[0]}`? Known" if near else "; known") + f": {', '.join(known)}"
