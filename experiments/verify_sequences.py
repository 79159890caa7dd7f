"""Re-checks catalogues of found codes: `python -m experiments.verify_sequences out/search_sequences/catalogue.jsonl`.

Every line is checked as if nobody had before: the symbols, number and lengths of its sequences, its value in rational
arithmetic, the class it names. The first bad line ends the run with its number, what is wrong with it, and exit status
1. Catalogues that pass are counted: lines, distinct codes, classes, hits, and the best value of each problem; a record
is an SIR above the best known one of its length.
"""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app
from tqdm import tqdm

from experiments.common.flags import SEED, out_folder
from experiments.common.results import print_table, start_meta, write_result
from gan import catalogue
from gan.sequences.known import is_record


def _entries(paths: Sequence[str]) -> Iterator[catalogue.Entry]:
    try:
        for path in paths:
            yield from tqdm(catalogue.read(path), unit="line", unit_scale=True, desc=path, leave=False)
    except (OSError, UnicodeDecodeError, catalogue.CatalogueError) as error:
        raise SystemExit(f"Refused: {error}") from error


def _row(problem: str, entries: Sequence[catalogue.Entry]) -> dict[str, Any]:
    hits = [entry for entry in entries if entry.problem.is_hit(entry.value)]
    best = max(entries, key=lambda entry: entry.value)
    return {
        "problem": problem,
        "lines": len(entries),
        "distinct": len({entry.code.tobytes() for entry in entries}),
        "classes": len({entry.class_id for entry in entries}),
        "hits": len(hits),
        "classes of hits": len({entry.class_id for entry in hits}),
        "best": best.value,
        "record": best.problem.name == "mmf" and is_record(best.problem.length, best.value),
    }


def main(argv: Sequence[str]) -> None:
    paths = argv[1:]
    if not paths:
        raise app.UsageError("Name one or more catalogues, such as out/search_sequences/catalogue.jsonl.")
    out = out_folder("verify_sequences")
    meta = start_meta({"catalogues": paths}, SEED.value)
    by_problem: dict[str, list[catalogue.Entry]] = collections.defaultdict(list)
    for entry in _entries(paths):
        by_problem[str(entry.problem)].append(entry)
    if not by_problem:
        raise SystemExit(f"Refused: {', '.join(paths)} holds no line, so there is nothing to verify.")
    rows = [_row(problem, entries) for problem, entries in by_problem.items()]
    print_table(rows, "Every line holds")
    write_result(out, meta, rows)


if __name__ == "__main__":
    app.run(main)
