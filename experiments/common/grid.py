"""Grids over the flags of a script: "speed=1,2;admission=none,predicted" is four cells, the last flag fastest."""

import dataclasses
import difflib
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Mapping

from absl import flags


class GridError(ValueError):
    """A grid that cannot be run, and why."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        values: what the grid chose, flag to text.
        arguments: the whole command line of the run, but for the folder of its results.
        name: of that folder: the same arguments and the same files have the same name, any others another.
    """

    values: Mapping[str, str]
    arguments: tuple[str, ...]
    name: str


def parse_grid(text: str, known: Mapping[str, flags.Flag]) -> dict[str, list[str]]:
    """Values of each flag in the grid. Every value is checked against its flag among `known`.

    Raises:
        GridError: names the part that is no `flag=value,value`, the flag that is unknown, or the value it cannot have.
    """
    grid: dict[str, list[str]] = {}
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, values = part.partition("=")
        chosen = [value.strip() for value in values.split(",")]
        if not equals or not all(chosen):
            raise GridError(f"`{part}` in the grid is no flag with values; write speed=1,2;admission=none,predicted.")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise GridError(f"The grid's `{name}` is no flag of the script; perhaps {', '.join(near)}.")
        if name in grid or len(set(chosen)) < len(chosen):
            raise GridError(f"The grid has `{name}`, or one of its values, twice: `{part}`; say each once.")
        for value in chosen:
            try:
                known[name].parser.parse(value)
            except (ValueError, TypeError) as error:
                raise GridError(f"The grid's {name}={value}: {error}.") from error
        grid[name] = chosen
    if not grid:
        raise GridError("The grid is empty; write speed=1,2;admission=none,predicted.")
    return grid


def cells(grid: Mapping[str, list[str]], fixed: Mapping[str, str], files: Iterable[pathlib.Path]) -> list[Cell]:
    """Every combination, beside the arguments of flags that are not in the grid (`fixed`: flag to arguments, by line).

    `files` are read by every run: a cell is another one once their size or time of change is.
    """
    stamps = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.exists()]
    shared = [line for name, lines in fixed.items() if name not in grid for line in lines.splitlines()]
    made = []
    for combination in itertools.product(*grid.values()):
        values = dict(zip(grid, combination, strict=True))
        arguments = (*shared, *(f"--{name}={value}" for name, value in values.items()))
        digest = hashlib.sha256(repr((arguments, stamps)).encode()).hexdigest()[:12]
        words = re.sub(r"[^\w.=,-]", "_", ",".join(f"{name}={value}" for name, value in values.items()))
        made.append(Cell(values, arguments, f"{words[:80]}-{digest}"))
    return made
