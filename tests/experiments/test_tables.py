"""Tables as a user sees them."""

import pytest
from rich.console import Console

from experiments.common import tables

ROWS = [{"plan": "1*(2xh100) -> 1*(2xh20+1xh20)"} | {f"figure_{i}": 10 * row + i for i in range(30)} for row in (1, 2)]


def test_what_is_piped_keeps_a_row_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    tables.print_table(ROWS, "Plans")
    lines = [line for line in capsys.readouterr().out.splitlines() if "h100" in line]
    assert [line.split("│")[-2].strip() for line in lines] == ["39", "49"]


def test_a_narrow_terminal_has_the_rows_side_by_side(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "Console", lambda: Console(width=80, force_terminal=True, color_system=None))
    tables.print_table(ROWS)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert [cell.strip() for cell in lines[-2].split("│")[1:4]] == ["figure_29", "39", "49"]
    tables.print_table([{"tokens": 1}])
    assert "tokens" in capsys.readouterr().out.splitlines()[1]
