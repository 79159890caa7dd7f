"""Trains a small language model on text that every Python installation has, and writes it as a Hugging Face folder.

    python -m experiments.train_lm --out=out/train_lm

An interrupted run continues when the same command is given again. `OUT/model` is the trained model with its tokenizer,
its held-out text and its score; `OUT/loss.png` and `OUT/result.json` tell how it came about.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags, logging
from flax import nnx
from tqdm import tqdm

from experiments.common.flags import define_float
from experiments.common.mesh_flags import flagged_mesh
from experiments.common.model_flags import DTYPE
from experiments.common.plots import save_curves
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.checkpoints import load_hf, save_hf
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.training.batches import token_stream
from model.training.config import TrainConfig
from model.training.corpus import Document, is_held_out, read_corpus
from model.training.evaluate import Evaluation, evaluate
from model.training.held_out import save_held_out
from model.training.loop import Trainer, TrainState, fit
from model.training.vocabulary import save_tokenizer, train_tokenizer
from model.transformer import Transformer

_DEFAULTS = TrainConfig()
_STEPS = flags.DEFINE_integer("steps", _DEFAULTS.steps, "Updates of the weights in all.")
_BATCH_TOKENS = flags.DEFINE_integer("batch_tokens", _DEFAULTS.batch_tokens, "Tokens per update.")
_CONTEXT = flags.DEFINE_integer("context", _DEFAULTS.context, "Tokens per training window.")
_LONG_STEPS = flags.DEFINE_integer(
    "long_steps", _DEFAULTS.long_steps, "Last updates, which train on windows of --long_context tokens."
)
_LONG_CONTEXT = flags.DEFINE_integer("long_context", _DEFAULTS.long_context, "Tokens per window in the last updates.")
_LEARNING_RATE = define_float("learning_rate", _DEFAULTS.learning_rate, "Peak learning rate of AdamW.")
_WARMUP_STEPS = flags.DEFINE_integer(
    "warmup_steps", _DEFAULTS.warmup_steps, "Updates until the learning rate reaches its peak."
)
_WEIGHT_DECAY = define_float("weight_decay", _DEFAULTS.weight_decay, "Weight decay of weight matrices.")
_CHECKPOINT_EVERY = flags.DEFINE_integer("checkpoint_every", 250, "Updates between checkpoints and held-out scores.")
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", 3072, "Token ids of the byte-level BPE.", lower_bound=257)
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 256, "Width of the model.")
_NUM_LAYERS = flags.DEFINE_integer("num_layers", 4, "Layers of the model.")
_NUM_HEADS = flags.DEFINE_integer("num_heads", 4, "Query heads of a layer.")
_NUM_KV_HEADS = flags.DEFINE_integer("num_kv_heads", 2, "KV heads of a layer.")
_HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Width of an attention head.")
_INTERMEDIATE_SIZE = flags.DEFINE_integer("intermediate_size", 704, "Width of the MLP.")
_MAX_LENGTH = flags.DEFINE_integer(
    "max_position_embeddings", 2048, "Most tokens of a sequence that the model may be served with."
)
flags.set_default(DTYPE, "bfloat16")  # of the model that is written; training is in float32


def _train_config() -> TrainConfig:
    return TrainConfig(
        steps=_STEPS.value,
        batch_tokens=_BATCH_TOKENS.value,
        context=_CONTEXT.value,
        long_steps=_LONG_STEPS.value,
        long_context=_LONG_CONTEXT.value,
        learning_rate=_LEARNING_RATE.value,
        warmup_steps=_WARMUP_STEPS.value,
        weight_decay=_WEIGHT_DECAY.value,
        seed=SEED.value,
    )


def _model_config() -> ModelConfig:
    return ModelConfig(
        model_type="llama",
        vocab_size=_VOCAB_SIZE.value,
        hidden_size=_HIDDEN_SIZE.value,
        num_layers=_NUM_LAYERS.value,
        num_heads=_NUM_HEADS.value,
        num_kv_heads=_NUM_KV_HEADS.value,
        head_dim=_HEAD_DIM.value,
        intermediate_size=_INTERMEDIATE_SIZE.value,
        max_position_embeddings=_MAX_LENGTH.value,
        tie_embeddings=True,
        bos_id=0,
        eos_ids=(0,),
    )


class _Progress:
    """A live line with the loss of the last steps and the last held-out score."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._bar = tqdm(total=steps, unit="step", dynamic_ncols=True)

    def __call__(self, step: int, state: TrainState) -> None:
        if step % 10 and step < self._steps:
            return
        scores = np.asarray(state.scores)
        scored = scores[np.isfinite(scores)]
        held_out = f"{scored[-1]:.3f}" if len(scored) else "-"
        self._bar.set_postfix_str(
            f"loss {np.asarray(state.losses)[max(0, step - 10) : step].mean():.3f}, held-out bits/byte {held_out}"
        )
        self._bar.update(step - self._bar.n)
        if step == self._steps:
            self._bar.close()


def _export(
    folder: pathlib.Path,
    model: Transformer,
    tokenizer: Tokenizer,
    held_out: Sequence[Document],
    contexts: Sequence[int],
    meta: Mapping[str, Any],
) -> list[Evaluation]:
    """Writes the model and scores what was written, computing in float32."""
    graph, weights = nnx.split(model)
    save_hf(folder, nnx.merge(graph, jax.tree.map(lambda weight: weight.astype(DTYPE.value), weights)))
    _, saved = load_hf(folder, dtype=jnp.float32)
    evaluations = [evaluate(saved, tokenizer, held_out, context=context) for context in contexts]
    save_held_out(folder, held_out, evaluations, {name: meta[name] for name in ("command", "versions", "started_at")})
    return evaluations


def _curve(state: TrainState, bits_per_nat: float) -> list[dict[str, float]]:
    """A row per checkpoint: the training loss since the one before, and the held-out score."""
    losses, scores = np.asarray(state.losses), np.asarray(state.scores)
    ends = np.flatnonzero(np.isfinite(scores)) + 1
    rows = []
    for start, end in zip([0, *ends[:-1]], ends, strict=True):
        loss = float(losses[start:end].mean())
        rows.append({"step": int(end), "loss": loss, "training_bits_per_byte": loss * bits_per_nat})
        rows[-1]["held_out_bits_per_byte"] = float(scores[end - 1])
    return rows


def main() -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells every file that it writes
    train_config, model_config = _train_config(), _model_config()
    out, meta = start_result()
    mesh = flagged_mesh()
    documents = read_corpus()
    held_out = [document for document in documents if is_held_out(document)]
    training = [document for document in documents if not is_held_out(document)]
    save_tokenizer(
        train_tokenizer((entry for d in training for entry in d.entries), _VOCAB_SIZE.value),
        out / "model",
        _MAX_LENGTH.value,
    )
    tokenizer = Tokenizer.from_folder(out / "model")
    model = Transformer(model_config, nnx.Rngs(SEED.value))
    stream = token_stream(tokenizer, training)
    trainer = Trainer(train_config, model, stream, mesh)
    state = fit(
        trainer,
        out / "checkpoints",
        checkpoint_every=_CHECKPOINT_EVERY.value,
        measure=lambda model: evaluate(model, tokenizer, held_out, context=_CONTEXT.value, mesh=mesh).bits_per_byte,
        on_step=_Progress(train_config.steps),
    )
    contexts = sorted({_CONTEXT.value, _LONG_CONTEXT.value})
    evaluations = _export(out / "model", trainer.model(state), tokenizer, held_out, contexts, meta)
    size = sum(len(entry.encode()) for document in training for entry in document.entries)
    rows = _curve(state, len(stream) / size / np.log(2))
    curves = {name: [(row["step"], row[f"{name}_bits_per_byte"]) for row in rows] for name in ("training", "held_out")}
    save_curves(out / "loss.png", "Training", "step", "bits per byte", curves)
    print_table(rows, title=f"{out / 'model'}: {model_config.parameter_count / 1e6:.2f} M parameters")
    print_table([dataclasses.asdict(found) for found in evaluations], title="Held-out text, of the model as written")
    totals = {
        "parameters": model_config.parameter_count,
        "training_tokens": len(stream),
        "training_bytes": size,
        "evaluations": evaluations,
    }
    write_result(out, meta, rows, totals)


if __name__ == "__main__":
    run(main)
