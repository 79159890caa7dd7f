"""One way in for scripts: whatever `--model` names."""

import os
import pathlib
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from model.checkpoints.errors import CheckpointError
from model.checkpoints.hf import load_hf
from model.checkpoints.native import restore
from model.config import ModelConfig
from model.presets import PRESETS, suggestion
from model.sharding import shard_model
from model.transformer import Transformer


def load(
    source: str | os.PathLike[str], mesh: Mesh | None = None, dtype: Any = None, seed: int = 0
) -> tuple[ModelConfig, Transformer]:
    """Loads a Hugging Face folder or an Orbax checkpoint, or makes a preset with random weights.

    Args:
      source: a folder, or a name of `model.presets.PRESETS`.
      mesh: of `parse_mesh`; None puts everything on the first device.
      dtype: of the weights; None keeps the stored one (float32 for a preset).
      seed: of the random weights of a preset.

    Raises:
      CheckpointError: when there is no such folder or preset, or it is not whole.
    """
    folder = pathlib.Path(source)
    if (folder / "config.json").exists():
        return load_hf(folder, mesh, dtype)
    if folder.is_dir():
        return restore(folder, mesh, dtype)
    if str(source) not in PRESETS:
        raise CheckpointError(f"`{source}` is neither a folder nor a preset{suggestion(str(source))}.")
    config = PRESETS[str(source)]
    model = Transformer(config, nnx.Rngs(seed), dtype or jnp.float32)
    return config, model if mesh is None else shard_model(model, mesh)
