"""Re-checks catalogues of found codes: `python -m experiments.verify_sequences out/search_sequences/catalogue.jsonl`.

Every line is checked as if nobody had before: the symbols, number and lengths of its sequences, its value in rational
arithmetic, the class it names. The first bad line ends the run with its number, what is wrong with it, and exit status
1. Catalogues that pass are counted: lines, distinct codes, classes, hits, and the best value of each problem, beside
the largest SIR that this project's own searches knew. A record is an SIR above a published one; its source is printed.

Codes of one sequence get the columns of a signal designer, and are exported by `--export`: `csv` (codes.csv: figures,
chips, hexadecimal; filters.csv: the taps of the mismatched filters), `mat` (codes.mat: the same for MATLAB).
"""

import collections
import csv
import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import scipy.io
from absl import app, flags
from tqdm import tqdm

from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table
from gan import catalogue
from gan.sequences.figures import code_figures, filter_taps, to_hex
from gan.sequences.known import known_sir, record_over

FORMATS = ("csv", "mat")
EXPORT = flags.DEFINE_list("export", [], f"Formats in which codes of one sequence are written: {', '.join(FORMATS)}.")


def _entries(paths: Sequence[str]) -> Iterator[catalogue.Entry]:
    try:
        for path in paths:
            yield from tqdm(catalogue.read(path), unit="line", unit_scale=True, desc=path, leave=False)
    except (OSError, UnicodeDecodeError, catalogue.CatalogueError) as error:
        raise SystemExit(f"Refused: {error}") from error


def _row(problem: str, entries: Sequence[catalogue.Entry]) -> dict[str, Any]:
    hits = [entry for entry in entries if entry.problem.is_hit(entry.value)]
    best = max(entries, key=lambda entry: entry.value)
    mmf = best.problem.name == "mmf"
    own = known_sir().get(best.problem.length) if mmf else None
    record = record_over(best.problem.length, best.value) if mmf else None
    return {
        "problem": problem,
        "lines": len(entries),
        "distinct": len({entry.code.tobytes() for entry in entries}),
        "classes": len({entry.class_id for entry in entries}),
        "hits": len(hits),
        "classes of hits": len({entry.class_id for entry in hits}),
        "best": best.value,
        "our table": own.sir if own else None,
        "record over": f"{record.sir:.6g}, {record.source}" if record else None,
    }


def _designer_row(entry: catalogue.Entry) -> dict[str, Any]:
    found = {"length": entry.problem.length, "method": entry.method, "seed": entry.seed}
    text, code = entry.problem.to_text(entry.code)[0], entry.code
    return found | dataclasses.asdict(code_figures(code)) | {"hex": to_hex(code), "chips": text}


def _export(out: pathlib.Path, rows: Sequence[dict[str, Any]], entries: Sequence[catalogue.Entry]) -> None:
    taps = [filter_taps(entry.code) for entry in entries]
    if "csv" in EXPORT.value:
        with open(out / "codes.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        with open(out / "filters.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([row["hex"], *map(repr, x.tolist())] for row, x in zip(rows, taps, strict=True))
    if "mat" in EXPORT.value:
        cells = {name: np.empty(len(entries), object) for name in ("codes", "taps")}
        for i, (entry, x) in enumerate(zip(entries, taps, strict=True)):
            cells["codes"][i], cells["taps"][i] = entry.code, x
        columns = {name: [row[name] for row in rows] for name in rows[0] if name not in ("method", "hex", "chips")}
        scipy.io.savemat(out / "codes.mat", cells | columns)


def main(*paths: str) -> None:
    if not paths:
        raise app.UsageError("Name one or more catalogues, such as out/search_sequences/catalogue.jsonl.")
    if unknown := [name for name in EXPORT.value if name not in FORMATS]:
        raise app.UsageError(f"--export={unknown[0]} is unknown; it must be among {', '.join(FORMATS)}.")
    out, meta = start_result()
    by_problem: dict[str, list[catalogue.Entry]] = collections.defaultdict(list)
    for entry in _entries(paths):
        by_problem[str(entry.problem)].append(entry)
    if not by_problem:
        raise SystemExit(f"Refused: {', '.join(paths)} holds no line, so there is nothing to verify.")
    rows = [_row(problem, entries) for problem, entries in by_problem.items()]
    print_table(rows, "Every line holds")
    codes = [entry for entries in by_problem.values() for entry in entries if entry.problem.name in ("mmf", "code")]
    designer = [_designer_row(entry) for entry in codes]
    write_result(out, meta, rows, {"codes": designer})
    if designer:
        print_table(designer, "Codes of one sequence, with matched and mismatched filters")
        _export(out, designer, codes)


if __name__ == "__main__":
    run(main, operands=True)
