"""Which weights a checkpoint holds, told without reading all of them."""

import hashlib
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from model.checkpoints.errors import CheckpointError
from model.checkpoints.hf import INDEX
from model.presets import PRESETS, suggestion

_SLICES = 64
_SLICE_BYTES = 4096


def fingerprint(source: str | os.PathLike[str], dtype: Any = None, seed: int = 0) -> str:
    """Returns a hex SHA-256 that names the weights which `load` makes of the same arguments.

    Of a folder it covers name and size of each file that `load` reads, and of each file 64 slices of 4 KiB, spread
    evenly: a second or less where hashing all weights takes minutes. Checkpoints that differ between those slices only
    are not told apart. Random weights of a preset are those of its name, `seed` and the version of JAX.

    Raises:
        CheckpointError: there is no such folder or preset.
    """
    folder = pathlib.Path(source)
    digest = hashlib.sha256(f"dtype={None if dtype is None else jnp.dtype(dtype).name}\n".encode())
    if folder.is_dir():
        for path in _files(folder):
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
            digest.update(_sampled(path))
    elif str(source) in PRESETS:
        digest.update(f"preset={source} seed={seed} jax={jax.__version__}\n".encode())
    else:
        raise CheckpointError(f"`{source}` is neither a folder nor a preset{suggestion(str(source))}.")
    return digest.hexdigest()


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    if not (folder / "config.json").exists():
        return sorted(path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path for path in folder.iterdir() if path.name in ("config.json", INDEX) or path.suffix == ".safetensors"
    )


def _sampled(path: pathlib.Path) -> bytes:
    """Returns the digest of evenly spread slices of a file, first and last bytes included."""
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for index in range(_SLICES):
            file.seek(max(0, size - _SLICE_BYTES) * index // (_SLICES - 1))
            digest.update(file.read(_SLICE_BYTES))
    return digest.digest()
