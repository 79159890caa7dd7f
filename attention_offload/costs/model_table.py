"""Models that the cost model knows by name: the presets of `model/`, and architectures that `model/` cannot run."""

import pathlib
from collections.abc import Mapping
from typing import Any

from attention_offload.costs.shapes import ModelShape
from attention_offload.errors import OffloadError
from model.presets import PRESETS, suggestion

# In the fields of Hugging Face.
_OTHERS: Mapping[str, Mapping[str, Any]] = {
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
NAMES = (*PRESETS, *_OTHERS)


def load_shape(model: str) -> ModelShape:
    """Returns the shape of a model by name, or of the `config.json` of a folder.

    Raises:
        OffloadError: neither a name nor a folder; lists the names.
    """
    if model in PRESETS:
        return ModelShape.from_config(PRESETS[model], model)
    if model in _OTHERS:
        return ModelShape.from_hf(_OTHERS[model], model)
    if not pathlib.Path(model).exists():
        raise OffloadError(f"No model `{model}`{suggestion(model, NAMES)}, or the folder of a Hugging Face config.")
    return ModelShape.from_hf(model)
