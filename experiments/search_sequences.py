"""Search methods side by side: `python -m experiments.search_sequences --problem=mmf --length=59 --method=hpgan,ga`.

Budgets count evaluations of complete codes, whoever makes them. The folder gets `result.json` (the best-so-far curve of
every run), `curves.png`, `classes.png` where hits were found, and `catalogue.jsonl` with every hit, exactly certified.
All are rewritten after every run, so an interrupted comparison leaves what it has.
"""

import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from tqdm import tqdm

from experiments.common.flags import SEED, out_folder
from experiments.common.plots import save_curves
from experiments.common.results import print_table, start_meta, write_result
from gan import catalogue, comparison, search
from gan.baselines.driver import Search
from gan.ledger import SearchResult
from gan.methods import METHODS
from gan.problems import PROBLEMS, Problem, problem
from gan.search import SearchConfig

PROBLEM = flags.DEFINE_enum(
    "problem",
    "mmf",
    list(PROBLEMS),
    "What to search; mmf_skew: mmf among skew-symmetric codes; ob_zcp_folded: ob_zcp by the chips that are free.",
)
LENGTH = flags.DEFINE_integer("length", 59, "Chips of one sequence.", lower_bound=1)
KIND = flags.DEFINE_integer("kind", 1, "Type of the pairs of ob_zcp: 1 or 2.")
FLOCKS = flags.DEFINE_integer("flocks", 2, "Flocks of a set of mocss.")
SEQUENCES = flags.DEFINE_integer("sequences", 2, "Sequences of a flock of mocss.")
METHOD = flags.DEFINE_list("method", ["hpgan"], f"One or several of {', '.join(METHODS)}; or all.")
BUDGET = flags.DEFINE_integer("budget", 200_000, "Evaluations of each run.", lower_bound=1)
SEEDS = flags.DEFINE_string("seeds", None, "One run each: `0-9`, `1,5` or `0-4,100-104`; --seed alone if absent.")
POPULATION = flags.DEFINE_integer(
    "population", None, "Elites, and children of a generation, of hpgan; its own sizes if absent.", lower_bound=2
)
STOP_AT = flags.DEFINE_float("stop_at", None, "Score at which a run ends before its budget is spent.")


def _problem() -> Problem:
    parameters = {}
    for flag, of in ((KIND, "ob_zcp"), (FLOCKS, "mocss"), (SEQUENCES, "mocss")):
        if PROBLEM.value.startswith(of):
            parameters[flag.name] = flag.value
        elif flag.present:
            raise app.UsageError(f"--{flag.name} belongs to --problem={of}, not to {PROBLEM.value}.")
    try:
        return problem(PROBLEM.value, LENGTH.value, **parameters)
    except ValueError as error:
        raise app.UsageError(str(error)) from error


def _methods() -> list[str]:
    if METHOD.value == ["all"]:
        return list(METHODS)
    if unknown := [name for name in METHOD.value if name not in METHODS]:
        raise app.UsageError(f"--method={unknown[0]} is unknown; it must be among {', '.join(METHODS)}, or all.")
    return list(dict.fromkeys(METHOD.value))


def _seeds() -> list[int]:
    if SEEDS.value is None:
        return [SEED.value]
    seeds: list[int] = []
    for part in SEEDS.value.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or int(last or first) < int(first):
            raise app.UsageError(f"--seeds={SEEDS.value}: {part!r} is neither a seed nor a range such as 0-9.")
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


def _search(method: str) -> Search:
    if method == "hpgan" and POPULATION.value:
        config = SearchConfig(elites=POPULATION.value, children=POPULATION.value)
        return functools.partial(search.run, config=config)
    return METHODS[method]


def _run(searched: Problem, method: str, seed: int) -> SearchResult:
    with tqdm(total=BUDGET.value, unit="eval", unit_scale=True, desc=f"{method} seed {seed}", leave=False) as bar:

        def progress(evaluations: int, best: float) -> None:
            bar.set_postfix_str(f"best {best:.4f}", refresh=False)
            bar.update(evaluations - bar.n)

        result = _search(method)(searched, BUDGET.value, seed, progress, stop_at=STOP_AT.value)
    if not math.isfinite(result.best):
        raise app.UsageError(f"--budget={BUDGET.value} ends before {method} has scored a code; give it more.")
    return result


def _save(out: pathlib.Path, meta: dict[str, Any], results: Sequence[SearchResult]) -> dict[str, Any]:
    searched = results[0].problem
    rows = [
        {"method": result.method, "seed": result.seed, "evaluations": evaluations, "best": best}
        for result in results
        for evaluations, best in result.curve
    ]
    totals = comparison.totals(results)
    write_result(out, meta, rows, totals)
    catalogue.write(out / "catalogue.jsonl", [entry for result in results for entry in result.entries])
    score = "SIR" if searched.target > 0 else "minus residual"
    save_curves(
        out / "curves.png",
        f"{searched}: best so far, median of {max(total['seeds'] for total in totals.values())} seed(s)",
        "evaluations",
        score,
        comparison.median_curves(results),
        logarithmic=True,
        levels={f"{mark.name} {mark.score:.6g}": mark.score for mark in comparison.marks(searched)},
    )
    if classes := comparison.class_curves(results):
        title = f"{searched}: classes of hits, all seeds together"
        save_curves(out / "classes.png", title, "evaluations of a run", "classes", classes, logarithmic=True)
    return totals


def _table(totals: dict[str, Any]) -> list[dict[str, Any]]:
    def text(spread: dict[str, Any]) -> str:
        median, low, high = (
            "-" if spread[name] is None else f"{spread[name]:,.6g}" if spread[name] < 1e5 else f"{spread[name]:,.0f}"
            for name in ("median", "min", "max")
        )
        return f"{median} [{low} to {high}]"

    return [
        {"method": method, "seeds": total["seeds"]}
        | {name: text(total[name]) for name in ("best", "hits", "classes")}
        | {
            f"evaluations to {name}": f"{reached['reached']}/{total['seeds']}: {text(reached)}"
            for name, reached in total["evaluations_to"].items()
        }
        for method, total in totals.items()
    ]


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unknown arguments {argv[1:]}; all settings are flags.")
    searched, methods, seeds = _problem(), _methods(), _seeds()
    out = out_folder("search_sequences")
    config = {"problem": str(searched), "methods": methods, "seeds": seeds, "population": POPULATION.value}
    meta = start_meta(config | {"budget": BUDGET.value, "stop_at": STOP_AT.value}, SEED.value)
    results: list[SearchResult] = []
    totals: dict[str, Any] = {}
    for seed in seeds:
        for method in methods:
            results.append(_run(searched, method, seed))
            totals = _save(out, meta, results)
    print_table(_table(totals), f"{searched}, {BUDGET.value:,} evaluations; medians [ranges] over seeds")


if __name__ == "__main__":
    app.run(main)
