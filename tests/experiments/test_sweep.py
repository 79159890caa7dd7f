"""Grids, and sweeps from the command line: what is finished is kept, what fails is said, what was killed goes on."""

import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.grid import GridError, cells, parse_grid
from tests.experiments.scripts import ROOT, TRACE


def command(out: pathlib.Path, grid: str, *arguments: str) -> list[str]:
    nodes = ("--prefill=1", "--decode=1", "--limit=40")
    return [
        *(sys.executable, "-m", "experiments.sweep"),
        *(f"--out={out}", f"--trace={TRACE}", f"--grid={grid}", *nodes, *arguments),
    ]


def sweep(out: pathlib.Path, grid: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, grid, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def rows(out: pathlib.Path) -> list[dict]:
    return json.loads((out / "result.json").read_text())["rows"]


def finished(out: pathlib.Path) -> dict[pathlib.Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}


def known() -> dict[str, flags.Flag]:
    values = flags.FlagValues()
    flags.DEFINE_float("speed", 1.0, "", lower_bound=0.0, flag_values=values)
    flags.DEFINE_enum("admission", "none", ["none", "predicted"], "", flag_values=values)
    flags.DEFINE_integer("limit", None, "", flag_values=values)
    return {name: values[name] for name in ("speed", "admission", "limit")}


@given(
    speeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    limits=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
)
def test_a_grid_is_every_combination_once(speeds: list[int], limits: list[int]) -> None:
    text = f"speed={','.join(map(str, speeds))}; limit={','.join(map(str, limits))}"
    made = cells(parse_grid(text, known()), {"limit": "--limit=7", "admission": "--admission=none"}, [])
    assert len({cell.name for cell in made}) == len(made) == math.prod((len(speeds), len(limits)))
    assert [(int(c.values["speed"]), int(c.values["limit"])) for c in made] == [(s, n) for s in speeds for n in limits]
    for cell in made:
        # The grid's own value replaces what was given for all cells.
        assert cell.arguments == ("--admission=none", *(f"--{name}={value}" for name, value in cell.values.items()))


def test_another_file_or_argument_is_another_cell(tmp_path: pathlib.Path) -> None:
    file = tmp_path / "trace"
    file.write_text("one")
    grid = {"speed": ["1"]}
    names = [cells(grid, {}, [file])[0].name, cells(grid, {"limit": "--limit=3"}, [file])[0].name]
    file.write_text("another")
    names.append(cells(grid, {}, [file])[0].name)
    assert len(set(names)) == 3


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("sped=1", "`sped` is no flag of the script; perhaps speed"),
        ("admission=none,nobody", "admission=nobody: value should be one of"),
        ("speed=-1", "speed=-1: -1.0 is not"),
        ("speed=1,1", "twice"),
        ("speed=1;speed=2", "twice"),
        ("speed", "`speed` in the grid is no flag with values"),
        ("speed=1,", "is no flag with values"),
        (" ; ", "The grid is empty"),
    ],
)
def test_a_bad_grid_is_one_clear_message(grid: str, message: str) -> None:
    with pytest.raises(GridError, match=message):
        parse_grid(grid, known())


def test_finished_cells_are_kept_and_failures_are_said(tmp_path: pathlib.Path) -> None:
    first = sweep(tmp_path, "speed=1,9")
    assert first.returncode == 0, first.stderr
    kept = finished(tmp_path)
    assert len(kept) == 2
    assert [row["speed"] for row in rows(tmp_path)] == ["1", "9"]
    assert all(row["requests"] == 40 for row in rows(tmp_path))
    assert rows(tmp_path)[0]["ttft_s.p90"] <= rows(tmp_path)[1]["ttft_s.p90"]

    wider = sweep(tmp_path, "speed=1,9;fail=0:0,1:77", "--shown=completed")
    assert wider.returncode != 0
    failed = [row for row in rows(tmp_path) if "error" in row]
    assert [row["fail"] for row in failed] == ["1:77", "1:77"]
    assert "77" in failed[0]["error"]
    assert "2 of 4 cells failed" in wider.stderr
    assert kept.items() <= finished(tmp_path).items()


def test_a_list_beside_the_grid_reaches_every_cell_whole(tmp_path: pathlib.Path) -> None:
    done = sweep(tmp_path, "speed=1", "--decode=2", "--fail=1:0,2.5:1")
    assert done.returncode == 0, done.stderr
    (cell,) = finished(tmp_path)
    assert json.loads(cell.read_text())["meta"]["config"]["fail"] == [[1.0, 0], [2.5, 1]]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: pathlib.Path, how: signal.Signals) -> None:
    grid = "speed=1,2,3,4"
    running = subprocess.Popen(command(tmp_path, grid, "--workers=1"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not finished(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(running.pid, how)
    _, said = running.communicate(timeout=60)
    assert running.returncode != 0
    if how == signal.SIGTERM:
        assert "the same command goes on" in said
    kept = finished(tmp_path)
    assert 1 <= len(kept) < 4
    assert not (tmp_path / "result.json").exists()
    again = sweep(tmp_path, grid)
    assert again.returncode == 0, again.stderr
    assert len(rows(tmp_path)) == len(finished(tmp_path)) == 4
    assert kept.items() <= finished(tmp_path).items()
