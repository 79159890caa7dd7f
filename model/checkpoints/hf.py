"""Checkpoints in the Hugging Face layout: `config.json` and one or more safetensors files.

Loading reads one tensor at a time, and of a sharded weight only the slices of this process's devices, straight into the
arrays of the model: host memory never holds a second copy of it.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from model.checkpoints.build import abstract_weights, build, named_weights
from model.checkpoints.errors import CheckpointError
from model.config import ModelConfig
from model.transformer import Transformer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_FILE_BYTES = 5 * 10**9

_DTYPES = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}
_MIXTRAL_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def tensor_names(config: ModelConfig, weight: str) -> list[str]:
    """The tensors of a checkpoint that make the weight of that name: one, or one per expert in their order."""
    parts = weight.split(".")
    if "experts" in parts:
        layer, projection = parts[1], parts[-1]
        block, name = "mlp", projection
        if config.model_type == "mixtral":
            block, name = "block_sparse_moe", _MIXTRAL_NAMES[projection]
        return [f"model.layers.{layer}.{block}.experts.{e}.{name}.weight" for e in range(config.num_experts)]
    if config.model_type == "mixtral" and "mlp" in parts:
        parts[parts.index("mlp")] = "block_sparse_moe"
    return [".".join(parts if parts[0] == "lm_head" else ["model", *parts])]


def load_hf(
    folder: str | os.PathLike[str], mesh: Mesh | None = None, dtype: Any = None
) -> tuple[ModelConfig, Transformer]:
    """Loads a Hugging Face checkpoint, tensor by tensor, onto a mesh.

    Args:
      folder: with `config.json` and `model.safetensors`, or several files and `model.safetensors.index.json`.
      mesh: of `parse_mesh`; None puts everything on the first device.
      dtype: of the weights; None keeps the one they are stored in.

    Raises:
      CheckpointError: listing every missing, extra and mis-shaped tensor, or the file that is absent or damaged.
      UnsupportedModelError: when the config asks for what this transformer does not compute.
      MeshError: when the mesh does not divide the model.
    """
    folder = pathlib.Path(folder)
    config = ModelConfig.from_hf(folder)
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        weights = abstract_weights(config, dtype or _stored_dtype(folder, tensors), mesh)
        _check(folder, config, weights, tensors)

        def read(name: str) -> jax.Array:
            weight, sources = weights[name], [tensors[source] for source in tensor_names(config, name)]

            def part(index: Any) -> np.ndarray:
                if len(weight.shape) < 3:
                    return sources[0][index].astype(weight.dtype, copy=False)
                return np.stack([source[index[1:]].astype(weight.dtype, copy=False) for source in sources[index[0]]])

            return jax.block_until_ready(jax.make_array_from_callback(weight.shape, weight.sharding, part))

        return config, build(config, weights["norm.weight"].dtype, read)


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    """Handles to every tensor of a checkpoint, by name; none is read yet."""
    if (folder / INDEX).exists():
        try:
            files = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (json.JSONDecodeError, KeyError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged ({error!r}). Fetch it again.") from error
    else:
        files = [SINGLE]
    if absent := [name for name in files if not (folder / name).exists()]:
        raise CheckpointError(
            f"{folder} lacks {', '.join(absent)}. Weights are read from safetensors files; "
            "convert a PyTorch `.bin` checkpoint with transformers' `save_pretrained` first."
        )
    tensors = {}
    for name in files:
        try:
            file = stack.enter_context(safe_open(folder / name, framework="np"))
        except SafetensorError as error:
            raise CheckpointError(f"{folder / name} is damaged ({error}). Fetch it again.") from error
        tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    return tensors


def _stored_dtype(folder: pathlib.Path, tensors: Mapping[str, Any]) -> jnp.dtype:
    stored = {tensor.get_dtype() for tensor in tensors.values()}
    if unknown := sorted(stored - _DTYPES.keys()):
        raise CheckpointError(f"{folder} stores {', '.join(unknown)}; known are {', '.join(_DTYPES)}.")
    return jnp.result_type(*(_DTYPES[name] for name in stored))


def _check(
    folder: pathlib.Path,
    config: ModelConfig,
    weights: Mapping[str, jax.ShapeDtypeStruct],
    tensors: Mapping[str, Any],
) -> None:
    expected = {}
    for weight_name, weight in weights.items():
        names = tensor_names(config, weight_name)
        expected |= dict.fromkeys(names, weight.shape if len(weight.shape) < 3 else weight.shape[1:])
    # Harmless company: frequencies that old Llama files carry, and the second copy of a tied embedding.
    ignored = {name for name in tensors if name.endswith("rotary_emb.inv_freq")}
    if config.tie_embeddings:
        ignored.add("lm_head.weight")
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unexpected {name}" for name in sorted(tensors.keys() - expected.keys() - ignored)]
    problems += [
        f"{name} has shape {tensors[name].get_shape()}, the config says {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].get_shape()) != shape
    ]
    if problems:
        raise CheckpointError(
            f"{folder} does not hold the `{config.model_type}` model of its config.json:\n  " + "\n  ".join(problems)
        )


def save_hf(folder: str | os.PathLike[str], model: Transformer, max_file_bytes: int = MAX_FILE_BYTES) -> None:
    """Writes a model as a Hugging Face checkpoint that transformers and other engines load.

    `config.json` is written last, so a folder that has one is whole. At most `max_file_bytes` of weights (or one
    tensor) are in host memory at once, and in one file.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for weight_name, weight in named_weights(model):
        names = tensor_names(model.config, weight_name)
        sizes |= dict.fromkeys(names, weight.nbytes // len(names))
    file_of = _assign_files(sizes, max_file_bytes)
    pending: dict[str, np.ndarray] = {}
    for weight_name, weight in named_weights(model):
        names = tensor_names(model.config, weight_name)
        host = np.asarray(weight)
        for index, name in enumerate(names):
            if pending and file_of[name] != file_of[next(iter(pending))]:
                _write(folder / file_of[next(iter(pending))], pending)
                pending = {}
            pending[name] = np.ascontiguousarray(host[index] if host.ndim == 3 else host)
    _write(folder / file_of[next(iter(pending))], pending)
    (folder / INDEX).unlink(missing_ok=True)
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": file_of}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    hf = model.config.to_hf() | {"dtype": str(model.norm.weight.dtype)}
    (folder / "config.json").write_text(json.dumps(hf, indent=1) + "\n")


def _assign_files(sizes: Mapping[str, int], max_file_bytes: int) -> dict[str, str]:
    """File of each tensor, filled in order."""
    numbers, number, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > max_file_bytes:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    if number == 1:
        return dict.fromkeys(sizes, SINGLE)
    return {name: f"model-{i:05d}-of-{number:05d}.safetensors" for name, i in numbers.items()}


def _write(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Whole or not at all; the metadata is what transformers looks for."""
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, metadata={"format": "pt"})
    os.replace(part, path)
