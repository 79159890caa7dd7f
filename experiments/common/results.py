"""Result files: every experiment writes the same `result.json` and prints the same kind of table."""

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

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

# Up to so many rows a table reads as well with its rows side by side.
_FEW_ROWS = 6
_UNBOUNDED = 10_000

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


def start_meta(config: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
    """What made a result: command, config, versions, machine, seed and start time. Call it when the run starts."""
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    script = ["python", "-m", spec.name] if spec else ["python", sys.argv[0]]
    return {
        "command": shlex.join([*script, *sys.argv[1:]]),
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


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def print_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> None:
    """Prints rows as one table; the columns are the keys in the order in which they first appear.

    Where a terminal is too narrow for a few long rows, each row becomes a column; what is piped is never folded.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = _table(columns, [[row.get(column) for column in columns] for row in rows], title)
    console = Console()
    needed = Measurement.get(console, console.options.update(width=_UNBOUNDED), table).maximum
    if not console.is_terminal:
        console = Console(width=max(needed, 1))
    elif needed > console.width and len(rows) <= _FEW_ROWS:
        table = _table(
            ["", *map(str, range(1, len(rows) + 1))], [[c, *(row.get(c) for row in rows)] for c in columns], title
        )
    console.print(table)


def _table(columns: Sequence[str], lines: Sequence[Sequence[Any]], title: str | None) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        numeric = all(isinstance(line[index], int | float | None) for line in lines)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for line in lines:
        table.add_row(*map(_cell, line))
    return table
