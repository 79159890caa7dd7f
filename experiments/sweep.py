"""Simulate every cell of a grid, one process per cell:

    python -m experiments.sweep --trace=trace.jsonl --grid="speed=1,2;admission=none,predicted" --out=out/sweep

Any flag of `simulate_cluster` can be in the grid, or be given once for all cells. Each cell has a folder of its own
under `--out`; a cell that is finished is kept, so a sweep that was stopped goes on where it was, and a larger grid
computes what is new in it. (Delete the folder after changes to the code.) A cell that fails is a row that says why; the
others go on, and the next run tries it again.
"""

import concurrent.futures
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from absl import flags
from tqdm import tqdm

from experiments import simulate_cluster
from experiments.common.flags import define_texts
from experiments.common.grid import Cell, GridError, cells, parse_grid
from experiments.common.results import flat, start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table

GRID = flags.DEFINE_string(
    "grid", None, "Grid of flags of simulate_cluster, as flag=value,value;flag=value,value.", required=True
)
WORKERS = flags.DEFINE_integer("workers", None, "Cells that run at once; by default one per core.", lower_bound=1)
SHOWN = define_texts(
    "shown",
    ["goodput_rps", "effective_ratio", "rejected", "hit_rate", "ttft_s.p90", "tbt_s.p90"],
    "Totals to print, by their names in result.json.",
)


class _Runner:
    """Runs cells as processes of their own, and ends those that run when it is stopped."""

    def __init__(self, out: pathlib.Path) -> None:
        self._out = out
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """The totals of a cell that is finished."""
        path = self._out / cell.name / "result.json"
        return json.loads(path.read_text())["totals"] if path.exists() else None

    def run(self, cell: Cell) -> dict[str, Any]:
        """The totals of a cell, or its `error`."""
        folder = self._out / cell.name
        command = [sys.executable, "-m", "experiments.simulate_cluster", *cell.arguments, f"--out={folder}"]
        with self._lock:
            if self._stopped:
                return {"error": "stopped"}
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            self._running.add(process)
        _, said = process.communicate()
        with self._lock:
            self._running.discard(process)
        if process.returncode:
            words = said.strip().splitlines() or [f"ended with {process.returncode} and said nothing"]
            return {"error": words[-1], "command": shlex.join(command)}
        return self.result(cell) or {"error": "wrote no result", "command": shlex.join(command)}

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()


def _cells() -> list[Cell]:
    known = {flag.name: flag for flag in flags.FLAGS.get_flags_for_module(simulate_cluster)}
    known[SEED.name] = flags.FLAGS[SEED.name]
    fixed = {name: flag.serialize() for name, flag in known.items() if flag.present}
    files = [pathlib.Path(path) for path in (simulate_cluster.TRACE.value, simulate_cluster.CALIBRATION.value) if path]
    return cells(parse_grid(GRID.value, known), fixed, files)


def _sweep(grid: Sequence[Cell], out: pathlib.Path) -> list[dict[str, Any]]:
    """The totals of every cell, in the order of the grid."""
    runner = _Runner(out)
    found = [runner.result(cell) for cell in grid]
    missing = [index for index, totals in enumerate(found) if totals is None]
    workers = WORKERS.value or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    with (
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(grid), initial=len(grid) - len(missing), desc="cells", unit="cell") as bar,
    ):
        futures = {pool.submit(runner.run, grid[index]): index for index in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                found[futures[future]] = future.result()
                bar.update()
        finally:
            runner.stop()
    return [totals or {} for totals in found]


def main() -> None:
    # A sweep that is told to end takes its cells along, as one that is interrupted does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    out, meta = start_result()
    grid = _cells()
    try:
        results = [flat(totals) for totals in _sweep(grid, out)]
    except KeyboardInterrupt:
        raise SystemExit("Stopped; the same command goes on from here.") from None
    rows = [{**cell.values, **totals, "folder": cell.name} for cell, totals in zip(grid, results, strict=True)]
    failed = sum("error" in row for row in rows)
    shown = [*grid[0].values, *SHOWN.value, *(["error"] if failed else [])]
    print_table([{name: row.get(name) for name in shown} for row in rows], f"{len(grid)} cells, {failed} failed")
    write_result(out, meta, rows, {"cells": len(grid), "failed": failed})
    if failed:
        raise SystemExit(f"{failed} of {len(grid)} cells failed; the same command tries those again.")


if __name__ == "__main__":
    run(main, GridError)
