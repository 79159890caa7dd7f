"""The training script from the command line: train, continue, score."""

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from tests.experiments.scripts import result_of

SCHEDULE = {"steps": 6, "batch_tokens": 64, "context": 32, "long_steps": 2, "long_context": 64, "warmup_steps": 2}
SHAPE = {"vocab_size": 300, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
TINY = [f"--{name}={value}" for name, value in (SCHEDULE | SHAPE | {"checkpoint_every": 3}).items()]


def test_a_model_is_trained_continued_and_scored(tmp_path):
    trained, _ = result_of("train_lm", tmp_path, *TINY)
    assert [row["step"] for row in trained["rows"]] == [3, 6]
    assert (tmp_path / "loss.png").stat().st_size > 1000
    continued, _ = result_of("train_lm", tmp_path, *TINY)
    assert continued["rows"] == trained["rows"]
    assert continued["totals"] == trained["totals"]

    folder = tmp_path / "model"
    config = ModelConfig.from_hf(folder)
    assert config.eos_ids == Tokenizer.from_folder(folder).eos_ids == (0,)
    recorded = trained["totals"]["evaluations"]
    scored, progress = result_of("eval_lm", tmp_path / "eval", f"--checkpoint={folder}", "--context=32")
    assert scored["rows"] == [recorded[0] | {"recorded_bits_per_byte": recorded[0]["bits_per_byte"]}]
    assert "context 32" in progress
