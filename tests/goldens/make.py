"""Makes the parity goldens: logits of tiny models computed by Hugging Face transformers (`pip install '.[parity]'`).

Run `python -m tests.goldens.make` from the repository root. One file per model family or feature holds its config.json,
the names and shapes of its tensors as transformers saves them, a prompt, and float32 logits of prefill and of 32 greedy
decode steps. Weights are not stored: `weight` makes them from their names.
"""

import json
import pathlib
import tempfile
import zlib
from typing import Any

import numpy as np

FOLDER = pathlib.Path(__file__).parent / "transformers"
PROMPT_TOKENS, DECODE_STEPS = 20, 32

_BASE = {
    "vocab_size": 80,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_LLAMA = _BASE | {"model_type": "llama"}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama_gqa": _LLAMA,
    "llama_mha_tied": _LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "llama_mqa_bias": _LLAMA | {"num_key_value_heads": 1, "attention_bias": True},
    "llama_llama3_rope": _LLAMA | {"rope_parameters": _LLAMA3_ROPE},
    "llama_linear_rope": _LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "llama_yarn_rope": _LLAMA | {"rope_parameters": _YARN_ROPE},
    "mistral_window": _BASE | {"model_type": "mistral", "sliding_window": 8},
    "qwen2_bias_tied": _BASE | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2_window": _BASE
    | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3_qk_norm": _BASE | {"model_type": "qwen3", "head_dim": 16},
    "mixtral": _BASE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": _BASE
    | {
        "model_type": "qwen3_moe",
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 weight of that name: uniform, scaled so that activations stay of order one; near 1 for norms.

    The raw stream of PCG64 is fixed by NumPy's compatibility policy, so a name gives the same weight everywhere.
    """
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = ((raw >> np.uint64(40)).astype(np.float32) / 2**23 - 1).reshape(shape)
    if "norm" in name:
        return 1 + uniform / 4
    return uniform * np.float32((3 / shape[-1]) ** 0.5)


def write_checkpoint(folder: pathlib.Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> None:
    """A Hugging Face folder with the weights that `weight` makes."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: weight(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


def transformers_logits(folder: pathlib.Path, prompt: np.ndarray, steps: int) -> tuple[np.ndarray, ...]:
    """Prefill logits [tokens, vocab], decode logits [steps, vocab] and the greedy tokens [steps] fed to them."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    tokens = prompt.tolist()
    with torch.no_grad():
        prefill = model(torch.tensor([tokens])).logits[0].numpy()
        decode, logits = [], prefill[-1]
        for _ in range(steps):
            tokens.append(int(logits.argmax()))
            logits = model(torch.tensor([tokens])).logits[0, -1].numpy()
            decode.append(logits)
    return prefill, np.stack(decode), np.array(tokens[len(prompt) :], np.int32)


def _shapes(config: dict[str, Any], folder: pathlib.Path) -> dict[str, list[int]]:
    """Names and shapes as transformers saves a model of this config."""
    import transformers
    from safetensors import safe_open

    fields = {name: value for name, value in config.items() if name != "model_type"}
    made = transformers.AutoConfig.for_model(config["model_type"], **fields)
    transformers.AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return {name: file.get_slice(name).get_shape() for name in sorted(file.keys())}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, config in CONFIGS.items():
        prompt = np.random.default_rng(0).integers(0, config["vocab_size"], PROMPT_TOKENS).astype(np.int32)
        with tempfile.TemporaryDirectory() as folder:
            shapes = _shapes(config, pathlib.Path(folder))
            saved = json.loads((pathlib.Path(folder) / "config.json").read_text())
            write_checkpoint(pathlib.Path(folder), saved, shapes)
            prefill, decode, tokens = transformers_logits(pathlib.Path(folder), prompt, DECODE_STEPS)
        checkpoint = np.array(json.dumps({"config": saved, "shapes": shapes}))
        np.savez_compressed(
            FOLDER / f"{name}.npz", checkpoint=checkpoint, prompt=prompt, tokens=tokens, prefill=prefill, decode=decode
        )


if __name__ == "__main__":
    main()
