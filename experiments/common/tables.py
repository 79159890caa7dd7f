"""Tables on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

# Up to so many rows a table reads as well with its rows side by side.
_FEW_ROWS = 6
_UNBOUNDED = 10_000


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
