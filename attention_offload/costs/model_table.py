"""Public model configurations by name, for scripts that have no checkpoint at hand."""

import pathlib
from collections.abc import Mapping
from typing import Any

from attention_offload.costs.shapes import ModelShape
from attention_offload.errors import OffloadError


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int, vocab: int = 32000, **more: Any) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
    } | more


# Public configurations by name, in the fields of Hugging Face.
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "llama-13b": _llama(5120, 40, 40, 40, 13824),
    "llama-33b": _llama(6656, 60, 52, 52, 17920),
    "llama-65b": _llama(8192, 80, 64, 64, 22016),
    "llama3-8b": _llama(4096, 32, 32, 8, 14336, 128256),
    "llama3-70b": _llama(8192, 80, 64, 8, 28672, 128256),
    "mixtral-8x7b": _llama(4096, 32, 32, 8, 14336) | {"model_type": "mixtral", "num_local_experts": 8},
    "qwen3-235b-a22b": _llama(4096, 94, 64, 4, 12288, 151936, head_dim=128)
    | {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536},
    "deepseek-v3": {
        "model_type": "deepseek_v3",
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "intermediate_size": 18432,
        "vocab_size": 129280,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3,
        "quantization_config": {"quant_method": "fp8"},
    },
}


def load_shape(model: str) -> ModelShape:
    """A preset by name, or the `config.json` of a folder. Raises `OffloadError` listing the presets."""
    if model in PRESETS:
        return ModelShape.from_hf(PRESETS[model], model)
    if not pathlib.Path(model).exists():
        raise OffloadError(f"No model `{model}`; known: {', '.join(PRESETS)}, or the folder of a Hugging Face config.")
    return ModelShape.from_hf(model)
