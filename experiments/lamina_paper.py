"""Lamina's tables and figures, the paper's numbers beside ours: `python -m experiments.lamina_paper --table=all`.

Table 4 needs the public traces: `--traces=Azure-Conv=azure_conv.csv,Kimi-Conv=conversation_trace.jsonl`.
"""

import dataclasses
import pathlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app

from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.errors import OffloadError
from attention_offload.paper.setups import TRACES as PAPER_TRACES
from attention_offload.paper.tables import NAMES, paper_table
from experiments.common.flags import define_texts
from experiments.common.plots import save_curves
from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table
from papers.comparison import PaperTable
from serving.workload.errors import TraceError
from serving.workload.traces import read_trace

TABLES = define_texts("table", ["all"], f"Tables to compute: all, or some of {', '.join(NAMES)}.")

TRACES = define_texts("traces", [], f"Trace files at hand, as name=file; names: {', '.join(PAPER_TRACES)}.")


def _read_traces() -> dict[str, tuple[int, DecodeWorkload]]:
    """Requests and lengths of the traces given, by the paper's name."""
    found = {}
    for entry in TRACES.value:
        name, _, path = entry.partition("=")
        if name not in PAPER_TRACES or not path:
            raise app.UsageError(f"--traces={entry}: use name=file, with a name of {', '.join(PAPER_TRACES)}.")
        requests = read_trace(path).requests
        lengths = [(request.input_tokens, request.output_tokens) for request in requests]
        found[name] = len(requests), DecodeWorkload.from_lengths(name, lengths)
    return found


def _save_plots(out: pathlib.Path, table: PaperTable) -> None:
    figures: dict[str, dict[str, list[tuple[Any, float]]]] = defaultdict(lambda: defaultdict(list))
    names = {}
    for point in table.curves:
        figures[point["figure"]][point["series"]].append((point["x"], point["y"]))
        names[point["figure"]] = point["x_name"], point["y_name"]
    for figure, series in figures.items():
        save_curves(out / f"{figure}.png", table.title, *names[figure], series)


def _rows(name: str, table: PaperTable) -> Sequence[Mapping[str, Any]]:
    return [{"table": name} | dataclasses.asdict(comparison) for comparison in table.comparisons]


def main() -> None:
    out, meta = start_result()
    rows, curves = [], []
    traces = _read_traces()
    for name in NAMES if TABLES.value == ["all"] else TABLES.value:
        table = paper_table(name, traces)
        rows += _rows(name, table)
        curves += table.curves
        print_table([dataclasses.asdict(comparison) for comparison in table.comparisons], table.title)
        _save_plots(out, table)
    verdicts = Counter(row["verdict"] for row in rows)
    print_table([{"verdict": verdict, "items": count} for verdict, count in verdicts.items()], "Totals")
    write_result(out, meta, rows, {"verdicts": verdicts, "curves": curves})


if __name__ == "__main__":
    run(main, TraceError, OffloadError)
