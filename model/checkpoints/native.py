"""Checkpoints in Orbax v1: written in parallel by all hosts, restored onto any mesh and any dtype.

The config travels in the checkpoint's metadata, as the `config.json` it would have in a Hugging Face folder.
"""

import os
import pathlib
from typing import Any

import jax
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from model.checkpoints.build import abstract_weights, build, named_weights
from model.checkpoints.errors import CheckpointError
from model.config import ModelConfig
from model.transformer import Transformer


def save(folder: str | os.PathLike[str], model: Transformer) -> None:
    """Writes a model; raises `CheckpointError` if `folder` already holds something."""
    folder = pathlib.Path(folder).absolute()
    if folder.exists():
        raise CheckpointError(f"{folder} exists already. Name a new folder, or remove it.")
    weights: Any = dict(named_weights(model))
    ocp.save(str(folder), weights, custom_metadata={"config": model.config.to_hf()})


def restore(
    folder: str | os.PathLike[str], mesh: Mesh | None = None, dtype: Any = None
) -> tuple[ModelConfig, Transformer]:
    """Reads a model that `save` wrote, each device its own part.

    Args:
      mesh: of `parse_mesh`, whatever it was at saving; None puts everything on the first device.
      dtype: of the weights; None keeps the one they are stored in.

    Raises:
      CheckpointError: when `folder` is not such a checkpoint.
      MeshError: when the mesh does not divide the model.
    """
    folder = pathlib.Path(folder).absolute()
    try:
        metadata = ocp.metadata(str(folder))
    except (FileNotFoundError, ocp.errors.InvalidLayoutError) as error:
        raise CheckpointError(f"{folder} is not an Orbax checkpoint: {error}") from error
    custom = metadata.custom_metadata
    hf = custom.get("config") if isinstance(custom, dict) else None
    if not isinstance(hf, dict):
        raise CheckpointError(f"The metadata of {folder} holds no model config; it was not written by `save`.")
    config = ModelConfig.from_hf(hf)
    stored = jax.tree.leaves(metadata.metadata)[0].dtype
    abstract: Any = abstract_weights(config, dtype or stored, mesh)
    weights: Any = ocp.load(str(folder), abstract)
    return config, build(config, dtype or stored, weights.__getitem__)
