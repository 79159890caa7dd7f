"""Mooncake's numbers beside ours: `python -m experiments.mooncake_paper --trace=conversation_trace.jsonl`.

Everything runs on models of A800 nodes, none of it on A800s. Rows whose traces are not public are marked blocked.
"""

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Callable

from absl import app, flags
from tqdm import tqdm

from experiments.common.flags import define_texts
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from papers.comparison import PaperTable, blocked
from serving.simulator.paper import cache, hardware, latency, overload, roles
from serving.workload.errors import TraceError
from serving.workload.traces import read_trace

TRACE = flags.DEFINE_string("trace", None, "Conversation trace of the paper, a Mooncake JSONL file.", required=True)
TABLES = define_texts("table", ["all"], "Tables to compute: all, or some of the names that a run of all prints.")
SEEDS = flags.DEFINE_integer(
    "seeds", 5, "Runs per cell of the tables that go beyond the paper.", lower_bound=2, upper_bound=10
)


def _missing() -> PaperTable:
    rows = (
        blocked("Figures 7, 13 and 15 (synthetic workload)", "§5", "the synthetic trace is not at hand"),
        blocked("Figure 6 (tool and agent)", "§5.2", "the tool and agent trace is not at hand"),
        blocked("arXiv Table 1", ".51 to .30", "its trace was replaced after publication"),
    )
    return PaperTable("Not computable here", rows)


def _tables(path: pathlib.Path) -> dict[str, Callable[[], PaperTable]]:
    trace = read_trace(path)
    return {
        "break_even": hardware.break_even,
        "figure_14": hardware.figure_14,
        "figure_9": lambda: cache.figure_9(trace),
        "figure_8": lambda: cache.figure_8(trace),
        "figure_10": lambda: cache.figure_10(trace),
        "figure_11": lambda: cache.figure_11(trace),
        "figure_5": lambda: latency.figure_5(trace),
        "figure_1": lambda: latency.figure_1(trace),
        "arxiv_figure_12": lambda: latency.figure_12(SEED.value),
        "arxiv_figure_13": lambda: latency.figure_13(trace),
        "arxiv_table_3": lambda: overload.table_3(path),
        "beyond": lambda: overload.beyond(path, SEEDS.value),
        "placements": lambda: overload.placements(path, SEEDS.value),
        "roles": lambda: roles.roles(path, SEEDS.value),
        "missing": _missing,
    }


def main() -> None:
    out, meta = start_result()
    tables = _tables(pathlib.Path(TRACE.value))
    names = list(tables) if TABLES.value == ["all"] else TABLES.value
    if unknown := set(names) - set(tables):
        raise app.UsageError(f"No table {', '.join(sorted(unknown))}; known: {', '.join(tables)}.")
    rows, curves = [], []
    for name in (progress := tqdm(names, desc="tables")):
        progress.set_postfix_str(name)
        table = tables[name]()
        rows += [{"table": name} | dataclasses.asdict(row) for row in table.comparisons]
        curves += table.curves
        print_table([dataclasses.asdict(row) for row in table.comparisons], table.title)
    verdicts = Counter(row["verdict"] for row in rows)
    print_table([{"verdict": verdict, "items": count} for verdict, count in verdicts.items()], "Totals")
    write_result(out, meta, rows, {"verdicts": verdicts, "curves": curves})


if __name__ == "__main__":
    run(main, TraceError)
