"""Reading and writing `config.json`, and what is refused."""

import json
import pathlib

import pytest

from model.config import ConfigError, ModelConfig, RopeConfig, UnsupportedModelError, dtype_bytes
from tests.goldens import make

LLAMA = make.CONFIGS["llama_gqa"]


@pytest.mark.parametrize("name", make.CONFIGS)
def test_a_config_survives_the_round_trip_through_hf(name: str):
    config = ModelConfig.from_hf(make.CONFIGS[name])
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_both_spellings_of_rope_are_the_same():
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 0.7}
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": scaling}
    new = LLAMA | {"rope_parameters": scaling | {"rope_theta": 5e5}}
    expected = RopeConfig(theta=5e5, kind="yarn", factor=4.0, original_max_position_embeddings=32, mscale=0.7)
    assert ModelConfig.from_hf(old).rope == ModelConfig.from_hf(new).rope == expected


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),  # Qwen's recipe
        ({"type": "yarn", "factor": 4.0}, 131_072),
        ({"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096}, 32_768),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}, 32_768),
        (None, 32_768),
    ],
)
def test_yarn_scales_the_context(scaling: dict | None, positions: int):
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if scaling and "rope_type" in scaling else {}
    hf = LLAMA | {"max_position_embeddings": 32_768, "rope_scaling": scaling and scaling | more}
    config = ModelConfig.from_hf({name: value for name, value in hf.items() if name != "rope_parameters"})
    assert config.max_position_embeddings == positions
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_an_unsupported_model_type_is_refused_with_those_supported():
    with pytest.raises(UnsupportedModelError, match="'gpt2' is not supported; supported: llama, mistral, qwen2"):
        ModelConfig.from_hf({"model_type": "gpt2"})


def test_everything_unsupported_is_listed_at_once():
    asked = {"hidden_act": "gelu", "mlp_bias": True, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    with pytest.raises(UnsupportedModelError, match=r"`gelu`.*`mlp_bias`.*`dynamic`"):
        ModelConfig.from_hf(LLAMA | asked)


def test_missing_fields_are_listed_at_once():
    with pytest.raises(ConfigError, match="lacks hidden_size, num_hidden_layers"):
        ModelConfig.from_hf({"model_type": "llama", "vocab_size": 4, "num_attention_heads": 1, "intermediate_size": 4})


def test_sizes_that_do_not_fit_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="multiple of `num_kv_heads`, got 4 and 3"):
        ModelConfig.from_hf(LLAMA | {"num_key_value_heads": 3})
    with pytest.raises(ValueError, match="`head_dim` must be even"):
        ModelConfig.from_hf(LLAMA | {"head_dim": 7})


def test_end_of_sequence_ids_come_from_both_files(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2]}))
    assert ModelConfig.from_hf(tmp_path).eos_ids == (2, 3)


def test_a_folder_without_a_config_is_an_error_that_names_it(tmp_path: pathlib.Path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        ModelConfig.from_hf(tmp_path)


@pytest.mark.parametrize(("text", "message"), [("{", "is not JSON"), ("[]", "must hold a JSON object, not a list")])
def test_a_damaged_config_is_an_error_that_names_it(tmp_path: pathlib.Path, text: str, message: str):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"config\.json {message}"):
        ModelConfig.from_hf(tmp_path)


def test_windows_by_layer():
    fields = {"use_sliding_window": True, "sliding_window": 6}
    assert [ModelConfig.from_hf(make.CONFIGS["qwen2_window"]).window(layer) for layer in range(2)] == [None, 6]
    by_type = LLAMA | fields | {"model_type": "qwen3", "layer_types": ["sliding_attention", "full_attention"]}
    assert [ModelConfig.from_hf(by_type).window(layer) for layer in range(2)] == [6, None]
    unused = fields | {"model_type": "qwen3", "use_sliding_window": False}
    assert ModelConfig.from_hf(LLAMA | unused).sliding_window is None


def test_kv_bytes_per_token():
    config = ModelConfig.from_hf(LLAMA)  # 2 layers, 2 KV heads of 8
    assert config.kv_bytes_per_token("bfloat16") == 2 * 2 * 2 * 8 * 2
    assert (dtype_bytes("float8_e4m3fn"), dtype_bytes("float32")) == (1, 4)
