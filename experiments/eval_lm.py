"""Bits per byte of a checkpoint on held-out text.

    python -m experiments.eval_lm --checkpoint=out/train_lm/model

A checkpoint made by `train_lm` brings its held-out text and its recorded score, so every Python version finds the same;
any other Hugging Face folder is scored on the held-out documents of this Python, or on `--text`.
"""

import dataclasses
import functools
import pathlib

import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from experiments.common.flags import define_integers
from experiments.common.mesh_flags import flagged_mesh
from experiments.common.model_flags import DTYPE
from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table
from model.checkpoints import CheckpointError, load_hf
from model.config import ConfigError
from model.sharding import MeshError
from model.tokenizer import Tokenizer
from model.training.corpus import Document, is_held_out, read_corpus
from model.training.evaluate import evaluate
from model.training.held_out import load_held_out

_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Hugging Face folder with the model to score.", required=True)
_TEXT = flags.DEFINE_string("text", None, "UTF-8 file to score on, in place of the held-out documents.")
_CONTEXT = define_integers("context", None, "Tokens per window of text; by default those of the recorded scores.")
_BATCH = flags.DEFINE_integer("batch", 8, "Windows of text scored at a time.", lower_bound=1)
flags.set_default(DTYPE, "float32")  # what recorded scores were computed in


def _documents(checkpoint: str) -> tuple[list[Document], dict[int, float], str]:
    """What to score on, recorded bits per byte by context, and a name for the text."""
    if _TEXT.value is not None:
        return [Document(_TEXT.value, (pathlib.Path(_TEXT.value).read_text(encoding="utf-8"),))], {}, _TEXT.value
    if (stored := load_held_out(checkpoint)) is not None:
        documents, evaluations = stored
        return (
            documents,
            {record.context: record.bits_per_byte for record in evaluations},
            "held out, of the checkpoint",
        )
    return [document for document in read_corpus() if is_held_out(document)], {}, "held out, of this Python"


def main() -> None:
    out, meta = start_result()
    mesh = flagged_mesh()
    config, model = load_hf(_CHECKPOINT.value, mesh, jnp.dtype(DTYPE.value))
    tokenizer = Tokenizer.from_folder(_CHECKPOINT.value)
    documents, recorded, text = _documents(_CHECKPOINT.value)
    rows = []
    for context in _CONTEXT.value or sorted(recorded) or [min(2048, config.max_position_embeddings)]:
        bar = functools.partial(tqdm, unit="batch", desc=f"context {context}", dynamic_ncols=True)
        found = evaluate(model, tokenizer, documents, context=context, batch=_BATCH.value, mesh=mesh, track=bar)
        rows.append(dataclasses.asdict(found) | {"recorded_bits_per_byte": recorded.get(context)})
    print_table(rows, title=f"{_CHECKPOINT.value}: {config.parameter_count / 1e6:.2f} M parameters; text: {text}")
    write_result(out, meta, rows, {"text": text, "parameters": config.parameter_count})


if __name__ == "__main__":
    run(main, CheckpointError, ConfigError, MeshError, FileNotFoundError)
