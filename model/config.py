"""`ModelConfig`: the shape of a decoder-only transformer, read from a Hugging Face `config.json`. No JAX here."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class ConfigError(ValueError):
    """A `config.json` is damaged, incomplete, or describes no possible model."""


class UnsupportedModelError(ConfigError):
    """A `config.json` asks for something that this transformer does not compute."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, arXiv:2104.09864) and how it is stretched to longer contexts.

    `kind` is "default", "linear" (positions divided by `factor`), "llama3" (by wavelength, Llama 3.1) or "yarn"
    (arXiv:2309.00071). Fields that a kind does not use keep their defaults.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ROPE_TYPES:
            raise UnsupportedModelError(f"RoPE of type `{self.kind}` is not supported; known: {', '.join(ROPE_TYPES)}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder-only transformer. Sizes count elements, heads, layers or tokens.

    A layer's MLP is a SwiGLU of `intermediate_size`, or `num_experts` of `moe_intermediate_size` with
    `experts_per_token` routed, except in `dense_mlp_layers`. Attention sees the last `sliding_window` tokens, except in
    `full_attention_layers`.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float = 1e-6
    rope: RopeConfig = RopeConfig()
    max_position_embeddings: int = 2048
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    num_experts: int = 0
    experts_per_token: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    dense_mlp_layers: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise UnsupportedModelError(
                f"`model_type` {self.model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}."
            )
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"`num_heads` must be a multiple of `num_kv_heads`, got {self.num_heads} and {self.num_kv_heads}."
            )
        if self.head_dim % 2:
            raise ConfigError(f"`head_dim` must be even (RoPE rotates pairs), got {self.head_dim}.")
        if self.experts_per_token > self.num_experts:
            raise ConfigError(f"Cannot route {self.experts_per_token} experts per token out of {self.num_experts}.")

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> "ModelConfig":
        """Reads a Hugging Face `config.json`: the parsed dict, the file, or the folder that holds it.

        From a folder, `generation_config.json` adds its end-of-sequence ids. Raises `UnsupportedModelError` naming
        every field that this transformer does not compute, and `ConfigError` naming every required field that is
        absent, or the file that is damaged.
        """
        if isinstance(source, Mapping):
            return _from_hf_dict(source)
        path = pathlib.Path(source)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"No `config.json` at {path}. Name a folder with a Hugging Face checkpoint.")
        config = _from_hf_dict(_read_json(path))
        generation = path.with_name("generation_config.json")
        if generation.exists():
            more = _ids(_read_json(generation).get("eos_token_id"))
            config = dataclasses.replace(config, eos_ids=tuple(dict.fromkeys((*config.eos_ids, *more))))
        return config

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this shape; `from_hf(config.to_hf()) == config`."""
        return _to_hf_dict(self)

    def window(self, layer: int) -> int | None:
        """How many tokens, itself included, a query of `layer` attends to; None means all before it."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def is_sparse(self, layer: int) -> bool:
        """Whether the MLP of `layer` is a mixture of experts."""
        return self.num_experts > 0 and layer not in self.dense_mlp_layers

    def kv_bytes_per_token(self, dtype: Any) -> int:
        """Bytes of K and V that one token leaves in the cache, all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes(dtype)

    @property
    def parameter_count(self) -> int:
        """Number of weights; a tied embedding counts once."""
        return self._count(self.num_experts)

    @property
    def active_parameter_count(self) -> int:
        """Number of weights that one token passes through (of a mixture: the routed experts only)."""
        return self._count(self.experts_per_token)

    def _count(self, experts: int) -> int:
        D, Q, K = self.hidden_size, self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = 2 * D * Q + 2 * D * K
        attention += (Q + 2 * K) * self.qkv_bias + D * self.output_bias + 2 * self.head_dim * self.qk_norm
        dense = 3 * D * self.intermediate_size
        sparse = 3 * D * self.moe_intermediate_size * experts + D * self.num_experts
        mlps = sum(sparse if self.is_sparse(layer) else dense for layer in range(self.num_layers))
        embeddings = self.vocab_size * D * (1 if self.tie_embeddings else 2)
        return embeddings + self.num_layers * (attention + 2 * D) + mlps + D


def dtype_bytes(dtype: Any) -> int:
    """Bytes of one element of a dtype given by name ("bfloat16") or as anything NumPy understands."""
    if isinstance(dtype, str):
        dtype = getattr(ml_dtypes, dtype, dtype)
    return np.dtype(dtype).itemsize


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not JSON ({error}). Fetch it again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} must hold a JSON object, not a {type(value).__name__}.")
    return value


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)


def _from_hf_dict(hf: Mapping[str, Any]) -> ModelConfig:
    model_type = hf.get("model_type")
    if model_type not in MODEL_TYPES:
        raise UnsupportedModelError(
            f"`model_type` {model_type!r} is not supported; supported: {', '.join(MODEL_TYPES)}."
        )
    required = _REQUIRED
    if model_type == "qwen3_moe":
        required = (*required, "num_experts_per_tok", "moe_intermediate_size")
    if missing := [name for name in required if hf.get(name) is None]:
        raise ConfigError(f"The config of a `{model_type}` model lacks {', '.join(missing)}.")
    if unsupported := _unsupported(hf):
        raise UnsupportedModelError(f"The config of a `{model_type}` model asks for {'; '.join(unsupported)}.")
    heads = hf["num_attention_heads"]
    bias = bool(hf.get("attention_bias", False))
    default_head_dim = 128 if model_type == "qwen3" else hf["hidden_size"] // heads
    return ModelConfig(
        model_type=model_type,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or default_head_dim,
        intermediate_size=hf["intermediate_size"],
        rms_norm_eps=hf.get("rms_norm_eps", 1e-5 if model_type == "mixtral" else 1e-6),
        rope=_rope(hf),
        max_position_embeddings=_max_positions(hf),
        tie_embeddings=hf.get("tie_word_embeddings", False),
        qkv_bias=bias or model_type == "qwen2",
        output_bias=bias,
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        **_window_fields(hf),
        **_expert_fields(hf),
        bos_id=hf.get("bos_token_id"),
        eos_ids=_ids(hf.get("eos_token_id")),
    )


def _unsupported(hf: Mapping[str, Any]) -> list[str]:
    """What the config asks for and this transformer would silently get wrong."""
    rope = _rope_fields(hf)
    checks = {
        f"activation `{hf.get('hidden_act')}` (only silu)": hf.get("hidden_act", "silu") not in ("silu", "swish"),
        "biases in the MLP (`mlp_bias`)": bool(hf.get("mlp_bias")),
        "quantised weights (`quantization_config`); dequantise the checkpoint first": bool(
            hf.get("quantization_config")
        ),
        "RoPE parameters that differ by layer": any(isinstance(value, Mapping) for value in rope.values()),
        f"RoPE of type `{_rope_kind(rope)}` (known: {', '.join(ROPE_TYPES)})": _rope_kind(rope) not in ROPE_TYPES,
        "RoPE on a part of the head (`partial_rotary_factor`)": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    return [what for what, asked in checks.items() if asked]


def _rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE fields from either spelling: `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling`."""
    fields = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if hf.get(name) is not None:
            fields.setdefault(name, hf[name])
    return fields


def _rope_kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _rope(hf: Mapping[str, Any]) -> RopeConfig:
    rope = _rope_fields(hf)
    kind = _rope_kind(rope)
    theta = rope.get("rope_theta") or (1e6 if hf["model_type"] == "mixtral" else 1e4)
    if kind == "default":
        return RopeConfig(theta=float(theta))
    original = rope.get("original_max_position_embeddings") or hf.get("max_position_embeddings", 2048)
    factor = rope.get("factor") or hf.get("max_position_embeddings", 2048) / original
    names = {field.name for field in dataclasses.fields(RopeConfig)} - {"theta", "kind", "factor"}
    given = {name: value for name, value in rope.items() if name in names and value is not None}
    if kind != "linear":
        given["original_max_position_embeddings"] = original
    return RopeConfig(theta=float(theta), kind=kind, factor=float(factor), **given)


def _max_positions(hf: Mapping[str, Any]) -> int:
    """Positions that the model takes: with YaRN, `factor` times those that it was trained with.

    Qwen's recipe for long contexts adds `rope_scaling` alone and leaves `max_position_embeddings` unscaled.
    """
    positions = hf.get("max_position_embeddings", 2048)
    rope = _rope(hf)
    if rope.kind != "yarn":
        return positions
    return max(positions, round(rope.original_max_position_embeddings * rope.factor))


def _window_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    qwen = hf["model_type"].startswith("qwen")
    window = hf.get("sliding_window")
    if window is None or (qwen and not hf.get("use_sliding_window", False)):
        return {}
    layers = range(hf["num_hidden_layers"])
    if hf.get("layer_types"):
        full = tuple(layer for layer in layers if hf["layer_types"][layer] == "full_attention")
    # Qwen3-MoE has one window for all layers; the dense Qwens start it at `max_window_layers`.
    elif qwen and hf["model_type"] != "qwen3_moe":
        full = tuple(layers[: hf.get("max_window_layers", 28)])
    else:
        full = ()
    return {} if len(full) == len(layers) else {"sliding_window": window, "full_attention_layers": full}


def _expert_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    # Each name has been the one that transformers saves, for each family, at some time.
    experts = hf.get("num_experts") or hf.get("num_local_experts")
    if hf["model_type"] == "mixtral":
        return {
            "num_experts": experts or 8,
            "experts_per_token": hf.get("num_experts_per_tok", 2),
            "moe_intermediate_size": hf["intermediate_size"],
        }
    if hf["model_type"] == "qwen3_moe":
        step = hf.get("decoder_sparse_step", 1)
        dense = set(hf.get("mlp_only_layers") or ())
        return {
            "num_experts": experts or 128,
            "experts_per_token": hf["num_experts_per_tok"],
            "moe_intermediate_size": hf["moe_intermediate_size"],
            "norm_topk_prob": bool(hf.get("norm_topk_prob", False)),
            "dense_mlp_layers": tuple(
                layer for layer in range(hf["num_hidden_layers"]) if layer in dense or (layer + 1) % step
            ),
        }
    return {}


_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


def _to_hf_dict(config: ModelConfig) -> dict[str, Any]:
    rope = {"rope_theta": config.rope.theta, "rope_type": config.rope.kind}
    if config.rope.kind != "default":
        rope |= {
            field.name: value
            for field in dataclasses.fields(RopeConfig)
            if field.name not in ("theta", "kind") and (value := getattr(config.rope, field.name)) != field.default
        } | {"factor": config.rope.factor}
    if config.rope.kind == "llama3":
        rope |= {"low_freq_factor": config.rope.low_freq_factor, "high_freq_factor": config.rope.high_freq_factor}
    hf: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.output_bias,
        "sliding_window": config.sliding_window,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids) or None,
    }
    if config.model_type.startswith("qwen"):
        hf["use_sliding_window"] = config.sliding_window is not None
    if config.full_attention_layers:
        kinds = ("sliding_attention", "full_attention")
        hf["layer_types"] = [kinds[layer in config.full_attention_layers] for layer in range(config.num_layers)]
    if config.model_type == "mixtral":
        hf |= {"num_local_experts": config.num_experts, "num_experts_per_tok": config.experts_per_token}
    if config.model_type == "qwen3_moe":
        hf |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
            "moe_intermediate_size": config.moe_intermediate_size,
            "norm_topk_prob": config.norm_topk_prob,
            "mlp_only_layers": list(config.dense_mlp_layers),
        }
    return hf
