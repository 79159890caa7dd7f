"""`ModelShape`: what the cost model needs to know of a decoder, whatever its attention, experts and number formats."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from attention_offload.errors import OffloadError
from model.config import MODEL_TYPES, ModelConfig

# Bytes of one element as stored; sub-byte formats are packed.
FORMAT_BYTES = {
    "float32": 4.0,
    "bfloat16": 2.0,
    "float16": 2.0,
    "float8_e4m3fn": 1.0,
    "int8": 1.0,
    "int4": 0.5,
    "float4_e2m1fn": 0.5,
}
# A quantised K or V vector carries one float32 scale per token and KV head.
_SCALE_BYTES = 4.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A decoder as the two sides of an offloaded model see it.

    Dense side: `parameters` (N of the paper: all weights), `active_parameters` (that one token passes through),
    `expert_parameters` of one expert over all its layers, of `num_experts` with `experts_per_token` routed.
    Attention side: `kv_elements` of K and V that a token leaves per layer, in vectors of `kv_vector` elements (one
    scale each when quantised); `kv_heads` among which a head-level split can divide them; `attention_flops` per pair of
    a query token and a context token, all layers. Between the sides, elements per token and layer: `query_elements` and
    `kv_elements` out, `output_elements` back, in the activations' `activation_bytes`. `compressed_kv` marks latent
    attention, which prefills in another form than it decodes (`prefill_attention_flops`).
    `window` tokens are seen by `windowed_layers` of the layers.
    """

    name: str
    num_layers: int
    hidden_size: int
    parameters: float
    active_parameters: float
    kv_heads: int
    kv_elements: int
    kv_vector: int
    query_elements: int
    output_elements: int
    attention_flops: float
    kv_projection_parameters: float
    num_experts: int = 0
    experts_per_token: int = 0
    expert_parameters: float = 0.0
    window: int | None = None
    windowed_layers: int = 0
    weight_format: str = "bfloat16"
    kv_format: str = "bfloat16"
    activation_bytes: float = 2.0
    compressed_kv: bool = False
    prefill_attention_flops: float = 0.0

    def __post_init__(self) -> None:
        for field in ("weight_format", "kv_format"):
            if getattr(self, field) not in FORMAT_BYTES:
                known = ", ".join(FORMAT_BYTES)
                raise OffloadError(f"`{field}` {getattr(self, field)!r} is not known; known: {known}.")
        if not self.prefill_attention_flops:
            object.__setattr__(self, "prefill_attention_flops", self.attention_flops)

    @classmethod
    def from_config(cls, config: ModelConfig, name: str = "") -> "ModelShape":
        """The shape of a transformer with multi-head, grouped-query or windowed attention, dense or with experts."""
        D, L, Dh = config.hidden_size, config.num_layers, config.head_dim
        sparse = sum(config.is_sparse(layer) for layer in range(L))
        windowed = sum(config.window(layer) is not None for layer in range(L))
        return cls(
            name=name or config.model_type,
            num_layers=L,
            hidden_size=D,
            parameters=config.parameter_count,
            active_parameters=config.active_parameter_count,
            kv_heads=config.num_kv_heads,
            kv_elements=2 * config.num_kv_heads * Dh,
            kv_vector=Dh,
            query_elements=config.num_heads * Dh,
            output_elements=config.num_heads * Dh,
            attention_flops=4.0 * config.num_heads * Dh * L,
            kv_projection_parameters=2.0 * D * config.num_kv_heads * Dh,
            num_experts=config.num_experts,
            experts_per_token=config.experts_per_token,
            expert_parameters=3.0 * D * config.moe_intermediate_size * sparse,
            window=config.sliding_window,
            windowed_layers=windowed,
        )

    @classmethod
    def from_hf(cls, source: Mapping[str, Any] | str | os.PathLike[str], name: str = "") -> "ModelShape":
        """Reads a Hugging Face `config.json` (dict, file or folder): any decoder, also those that `model/` cannot run.

        Families other than `model.config.MODEL_TYPES` count as a gated decoder with the fields that they share with
        Llama; multi-head latent attention (DeepSeek) is recognised by `kv_lora_rank`. A `quantization_config` sets the
        formats of weights and KV. Raises `OffloadError` naming the fields that are missing, or an unknown format.
        """
        if not isinstance(source, Mapping):
            path = pathlib.Path(source)
            path = path / "config.json" if path.is_dir() else path
            if not path.exists():
                raise OffloadError(f"No `config.json` at {path}. Name a folder with a Hugging Face config.")
            return cls.from_hf(json.loads(path.read_text()), name or path.parent.name)
        hf = source.get("text_config", source)
        name = name or str(hf.get("model_type", "model"))
        quantisation = source.get("quantization_config") or hf.get("quantization_config") or {}
        hf = {key: value for key, value in hf.items() if key != "quantization_config"}
        if hf.get("kv_lora_rank"):
            shape = _latent_attention(hf, name)
        elif hf.get("model_type") in MODEL_TYPES:
            shape = cls.from_config(ModelConfig.from_hf(hf), name)
        else:
            shape = cls.from_config(ModelConfig.from_hf(_as_llama(hf)), name)
        return shape.quantised(*_stored_formats(quantisation, name))

    @property
    def weight_bytes(self) -> float:
        """Bytes of one copy of the weights (eN)."""
        return self.parameters * FORMAT_BYTES[self.weight_format]

    @property
    def compute_format(self) -> str:
        """Number format of the GEMMs: that of floating-point weights; bfloat16 for integer ones (weight-only)."""
        return self.weight_format if self.weight_format.startswith("float") else "bfloat16"

    @property
    def kv_bytes_per_token(self) -> float:
        """Bytes of K and V that a token leaves in the cache, all layers together, scales included."""
        return self.num_layers * self._stored_kv_bytes

    @property
    def crossing_bytes(self) -> float:
        """Bytes that cross between the sides per token and layer: q, k and v out, the attention output back (§1.2).

        (2 + 2/G)·e·d for grouped-query attention. K and V cross as they are stored.
        """
        return self.query_bytes + self.kv_crossing_bytes + self.output_bytes

    @property
    def query_bytes(self) -> float:
        return self.query_elements * self.activation_bytes

    @property
    def output_bytes(self) -> float:
        return self.output_elements * self.activation_bytes

    @property
    def kv_crossing_bytes(self) -> float:
        return self._stored_kv_bytes

    @property
    def _stored_kv_bytes(self) -> float:
        scales = self.kv_elements / self.kv_vector * _SCALE_BYTES if FORMAT_BYTES[self.kv_format] <= 1 else 0.0
        return self.kv_elements * FORMAT_BYTES[self.kv_format] + scales

    def attended(self, context: float) -> float:
        """Context tokens that a query attends to, averaged over layers: `context`, less what windows hide."""
        if self.window is None:
            return context
        seen = min(context, self.window)
        return context + (seen - context) * self.windowed_layers / self.num_layers

    def weights_read(self, batch: float) -> float:
        """Bytes of weights that a step over `batch` tokens reads: every expert that some token is routed to, once."""
        if not self.num_experts:
            return self.weight_bytes
        missed = (1 - self.experts_per_token / self.num_experts) ** batch
        skipped = self.num_experts * missed * self.expert_parameters
        return (self.parameters - skipped) * FORMAT_BYTES[self.weight_format]

    def quantised(self, weights: str | None = None, kv: str | None = None) -> "ModelShape":
        """Returns the same model with weights and KV in other formats; None keeps a format."""
        return dataclasses.replace(self, weight_format=weights or self.weight_format, kv_format=kv or self.kv_format)


# Formats of the weights by `quant_method`, where the method leaves no choice.
_METHODS = {"fp8": "float8_e4m3fn", "fbgemm_fp8": "float8_e4m3fn", "mxfp4": "float4_e2m1fn", "awq": "int4"}
_FORMATS: Mapping[tuple[str, int | None], str] = {
    ("float", 8): "float8_e4m3fn",
    ("float", 4): "float4_e2m1fn",
    ("int", 8): "int8",
    ("int", 4): "int4",
}


def _stored_formats(quantisation: Mapping[str, Any], name: str) -> tuple[str | None, str | None]:
    """Formats of weights and KV that a `quantization_config` names; None where it leaves them alone."""
    method = quantisation.get("quant_method")
    if not method:
        return None, None
    groups = quantisation.get("config_groups", {}).values()
    scheme = next((group["weights"] for group in groups if group.get("weights")), quantisation)
    bits = scheme.get("num_bits") or scheme.get("bits")
    if bits is None and method == "bitsandbytes":
        bits = 4 if quantisation.get("load_in_4bit") else 8
    weights = _METHODS.get(method) or _FORMATS.get((scheme.get("type", "int"), bits))
    if weights is None:
        raise OffloadError(
            f"The config of `{name}` is quantised by `{method}` with {bits} bits, whose size is not known here. Leave "
            "`quantization_config` out and set the format by hand."
        )
    cache = quantisation.get("kv_cache_scheme")
    return weights, _FORMATS.get((cache.get("type", "float"), cache.get("num_bits"))) if cache else None


_SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "tie_word_embeddings",
    "max_position_embeddings",
    "sliding_window",
    "layer_types",
)


def _as_llama(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of another family's config that decide costs, as a Llama or, with experts, a Qwen3-MoE."""
    fields = {name: hf[name] for name in _SHARED_FIELDS if hf.get(name) is not None}
    fields.setdefault("intermediate_size", hf.get("ffn_dim", 4 * hf.get("hidden_size", 0)))
    experts = hf.get("num_experts") or hf.get("num_local_experts") or hf.get("n_routed_experts")
    if not experts:
        return fields | {"model_type": "mistral"}
    return fields | {
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": hf.get("num_experts_per_tok") or hf.get("experts_per_token"),
        "moe_intermediate_size": hf.get("moe_intermediate_size") or hf.get("intermediate_size"),
        "use_sliding_window": "sliding_window" in fields,
    }


def _latent_attention(hf: Mapping[str, Any], name: str) -> ModelShape:
    """DeepSeek's multi-head latent attention, decoded in its absorbed form: one latent KV for all heads."""
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "qk_rope_head_dim", "qk_nope_head_dim")
    if missing := [field for field in (*needed, "v_head_dim", "vocab_size") if hf.get(field) is None]:
        raise OffloadError(f"The config of `{name}` has `kv_lora_rank` but lacks {', '.join(missing)}.")
    D, L, H = hf["hidden_size"], hf["num_hidden_layers"], hf["num_attention_heads"]
    latent, rope, nope, v = (hf[key] for key in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
    q_rank = hf.get("q_lora_rank")
    query = D * q_rank + q_rank * H * (nope + rope) if q_rank else D * H * (nope + rope)
    attention = query + D * (latent + rope) + latent * H * (nope + v) + H * v * D
    experts = hf.get("n_routed_experts") or 0
    routed = hf.get("num_experts_per_tok") or 0
    sparse = L - hf.get("first_k_dense_replace", 0) if experts else 0
    expert = 3 * D * (hf.get("moe_intermediate_size") or 0)
    shared = sparse * (expert * (hf.get("n_shared_experts") or 0) + D * experts)
    base = 2 * hf["vocab_size"] * D + L * attention + (L - sparse) * 3 * D * hf["intermediate_size"] + shared
    return ModelShape(
        name=name,
        num_layers=L,
        hidden_size=D,
        parameters=base + sparse * expert * experts,
        active_parameters=base + sparse * expert * routed,
        kv_heads=1,
        kv_elements=latent + rope,
        kv_vector=latent + rope,
        query_elements=H * (latent + rope),
        output_elements=H * latent,
        attention_flops=2.0 * H * (2 * latent + rope) * L,
        prefill_attention_flops=2.0 * H * (nope + rope + v) * L,
        kv_projection_parameters=D * (latent + rope),
        num_experts=experts,
        experts_per_token=routed,
        expert_parameters=sparse * expert,
        compressed_kv=True,
    )
