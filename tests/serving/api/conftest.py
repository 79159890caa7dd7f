"""A byte-level tokenizer with a chat template, and a tiny random model, in folders as Hugging Face writes them."""

import json
import pathlib

import pytest
import tokenizers
from flax import nnx

from model.checkpoints import save_hf
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|end|>", "<|user|>", "<|system|>", "<|assistant|>")


def write_tokenizer(folder: pathlib.Path) -> None:
    """Ids 0 to 255 are single bytes; the special tokens follow, `<|end|>` first."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({byte: id for id, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([tokenizers.AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": SPECIAL_TOKENS[0], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


SERVER_FLAGS = ("--page_size=16", "--num_pages=256", "--max_batch=4", "--token_budget=64", "--max_open_requests=64")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random Llama of 0.1 M parameters with a context of 1024 tokens, as an HF folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    config = ModelConfig(
        model_type="llama",
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        max_position_embeddings=1024,
    )
    save_hf(folder, Transformer(config, nnx.Rngs(0)))
    write_tokenizer(folder)
    return folder
