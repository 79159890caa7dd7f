"""Result files: every experiment writes the same `result.json`, into the folder that `--out` names."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from experiments.common import script

OUT = flags.DEFINE_string("out", None, "Folder for result.json, plots and timelines; made where there is none.")

_LIBRARIES = ("halfmoon", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _devices() -> list[str]:
    """Kinds of the JAX devices in use; empty when the script never imported JAX."""
    jax = sys.modules.get("jax")
    return [device.device_kind for device in jax.devices()] if jax else []


def _out_folder() -> pathlib.Path:
    """The folder of `--out`, or `out/` and the name of the script; made, and checked to be writable."""
    folder = pathlib.Path(OUT.value or os.path.join("out", script.name()))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise app.UsageError(f"--out={folder} cannot be written: {error}. Name a folder that can.") from error
    return folder


def start_meta(config: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """What makes a result: command, config, versions, machine, seed and start time."""
    return {
        "command": shlex.join(["python", "-m", f"experiments.{script.name()}", *sys.argv[1:]]),
        "config": dict(config),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _LIBRARIES},
        "machine": {
            "processor": _processor(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "system": platform.platform(),
        },
        "seed": seed,
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def start_result() -> tuple[pathlib.Path, dict[str, Any]]:
    """Begins the result of a script: the folder for it, and its `start_meta` with every flag of the script.

    Call it before the long part of a run. Raises `app.UsageError` where the folder cannot be written.
    """
    return _out_folder(), start_meta(script.flag_values(), script.SEED.value)


def flat(totals: Mapping[str, Any]) -> dict[str, Any]:
    """Totals in one row: what is in a distribution or a count by name becomes `name.part`, "ttft_s.p90"."""
    row: dict[str, Any] = {}
    for name, value in totals.items():
        row |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, Mapping) else {name: value}
    return row


def write_text_atomically(path: pathlib.Path, text: str) -> None:
    """Writes `path` whole or not at all, so a killed run never leaves half a file under the final name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _jsonable(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if hasattr(value, "item"):
        return value.item()
    return str(value)


def write_result(
    out: str | os.PathLike[str],
    meta: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    totals: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Writes `{"meta", "rows", "totals"}` to `out/result.json` and returns its path."""
    machine = dict(meta["machine"]) | {"devices": _devices()}
    result = {"meta": dict(meta) | {"machine": machine}, "rows": list(rows), "totals": dict(totals or {})}
    path = pathlib.Path(out) / "result.json"
    write_text_atomically(path, json.dumps(result, indent=1, default=_jsonable, allow_nan=False) + "\n")
    return path
