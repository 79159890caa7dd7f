"""Converts a checkpoint between Hugging Face and Orbax, and between dtypes; the tokenizer goes with it.

python -m experiments.convert_checkpoint --source=Llama-3.2-1B --target=llama-orbax --to=orbax --dtype=bfloat16
python -m experiments.convert_checkpoint --source=bench-58m --target=bench-hf --to=hf     # random weights of a preset
"""

import pathlib
import shutil

from absl import app, flags

from experiments.common import mesh_flags, model_flags
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.checkpoints import CheckpointError, load, save, save_hf
from model.config import ConfigError
from model.sharding import MeshError

SOURCE = flags.DEFINE_string(
    "source",
    None,
    "Checkpoint to convert: a Hugging Face or Orbax folder, or a preset (random weights).",
    required=True,
)
TARGET = flags.DEFINE_string("target", None, "Folder to write the converted checkpoint to.", required=True)
TO = flags.DEFINE_enum("to", None, ["hf", "orbax"], "Format to convert to.", required=True)

# What stands beside the weights and belongs to the text side.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def main() -> None:
    source, target = pathlib.Path(SOURCE.value), pathlib.Path(TARGET.value)
    if target.exists() and any(target.iterdir()):
        raise app.UsageError(f"--target={target} is not empty. Name a new folder.")
    config, model = load(SOURCE.value, mesh_flags.flagged_mesh(), model_flags.DTYPE.value, SEED.value)
    if TO.value == "hf":
        save_hf(target, model)
    else:
        save(target, model)
    copied = [name for name in COMPANIONS if (source / name).exists()]
    for name in copied:
        shutil.copyfile(source / name, target / name)
    row = {"target": str(target), "format": TO.value, "model_type": config.model_type}
    row |= {"parameters": config.parameter_count, "dtype": str(model.norm.weight.dtype), "copied": ", ".join(copied)}
    print_table([row])


if __name__ == "__main__":
    run(main, CheckpointError, ConfigError, MeshError)
