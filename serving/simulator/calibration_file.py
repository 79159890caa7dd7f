"""Calibrations as files: a `Performance` in JSON."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from serving.conductor import TimeModel
from serving.simulator.decode_table import DecodeTable
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import Performance
from serving.simulator.steps import EngineModel


def read_performance(path: str | os.PathLike[str]) -> Performance:
    """Reads a calibration: a JSON object with the fields of `Performance`, `costs` an object with those of `TimeModel`,
    and perhaps `engine` with those of `EngineModel` and a `meta` that says how it was made.

    Raises:
        SimulatorError: names the file and the field that is missing, unknown or not a finite number of at least 0.
    """
    try:
        fields = json.loads(pathlib.Path(path).read_text())
        costs, table, engine = fields.pop("costs"), fields.pop("decode_table", None), fields.pop("engine", None)
        fields.pop("meta", None)
        for name, value in [*costs.items(), *((k, v) for k, v in fields.items() if k != "source")]:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise SimulatorError(f"{path}: `{name}` is {value!r}; use a finite number of at least 0.")
        if table is not None:
            seconds = tuple(map(tuple, table["seconds"]))
            table = DecodeTable(tuple(table["batches"]), tuple(table["contexts"]), seconds)
        steps = EngineModel.from_json(engine) if engine is not None else None
        return Performance(costs=TimeModel(**costs), **fields, decode_table=table, engine=steps)
    except OSError as error:
        raise SimulatorError(f"Cannot read the calibration {path}: {error.strerror}.") from error
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        if isinstance(error, SimulatorError):
            raise
        raise SimulatorError(f"{path} is not a calibration: {error}. Write one with `write_performance`.") from error


def write_performance(
    path: str | os.PathLike[str], performance: Performance, meta: Mapping[str, Any] | None = None
) -> None:
    """Writes a calibration that `read_performance` reads; `meta` says how it was made."""
    fields = dataclasses.asdict(performance) | ({"meta": meta} if meta else {})
    pathlib.Path(path).write_text(json.dumps(fields, indent=1) + "\n")
