"""A tiny random model and the sizes of engines that serve it."""

import numpy as np

from model.config import ModelConfig
from serving.engine import EngineConfig

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
    }
)
SIZES = EngineConfig(page_size=8, num_pages=64, max_batch=4, token_budget=24, max_prefill_rows=2)


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of 1 to 49 tokens."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(0, 97, rng.integers(1, 50)).tolist()) for _ in range(count)]
