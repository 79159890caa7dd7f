"""Search methods side by side: `python -m experiments.search_sequences --problem=mmf --method=surrogate,ga`.

Budgets count evaluations of complete codes, whoever makes them; `--cpu_limit_s` makes processor seconds equal instead.
The folder gets `result.json` (the best-so-far curve of every run, in both currencies), `curves.png`, `classes.png`
where hits were found, and `catalogue.jsonl`: every hit, exactly certified, and the best code of every run without one.
With several lengths, plots have the length in their names. All are rewritten after every run, so an interrupted
comparison leaves what it has.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from tqdm import tqdm

from experiments.common.flags import define_float, define_integers
from experiments.common.plots import save_curves
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from gan import catalogue, comparison, surrogate
from gan.baselines import genetic
from gan.baselines.genetic import GeneticSettings
from gan.ledger import SearchResult
from gan.methods import METHODS
from gan.objectives import CodeObjective
from gan.problems import PROBLEMS, Problem, problem
from gan.search import Search
from gan.surrogate import SurrogateSettings

PROBLEM = flags.DEFINE_enum(
    "problem",
    "mmf",
    list(PROBLEMS),
    "Problem to search; mmf_skew: mmf among skew-symmetric codes; ob_zcp_folded: ob_zcp by the chips that are free.",
)
LENGTH = define_integers("length", [59], "Chips of one sequence; several lengths are searched one after another.")
OBJECTIVE = flags.DEFINE_string(
    "objective",
    None,
    "Searches single codes for this instead of --problem: psl (N / PSL), merit_factor (N^2 / ISL), or module:function, "
    "which takes codes float32 [B, N] of +1 and -1 and returns scores [B] in jax.numpy, higher for better.",
)
KIND = flags.DEFINE_integer("kind", 1, "Type of the pairs of ob_zcp: 1 or 2.")
FLOCKS = flags.DEFINE_integer("flocks", 2, "Flocks of a set of mocss.")
SEQUENCES = flags.DEFINE_integer("sequences", 2, "Sequences of a flock of mocss.")
METHOD = flags.DEFINE_list("method", ["surrogate"], f"Search methods: all, or some of {', '.join(METHODS)}.")
BUDGET = flags.DEFINE_integer("budget", 200_000, "Evaluations of each run.", lower_bound=1)
CPU_LIMIT_S = define_float(
    "cpu_limit_s", None, "Processor seconds after which a run ends; its compilation counts.", lower_bound=0.0
)
SEEDS = flags.DEFINE_string(
    "seeds", None, "Seeds of one run each, such as `0-9`, `1,5` or `0-4,100-104`; by default --seed alone."
)
POPULATION = flags.DEFINE_integer(
    "population",
    None,
    "Elites of surrogate and ga; as many children a generation in surrogate, twice as many in ga. Absent: defaults.",
    lower_bound=2,
)
STOP_AT = define_float("stop_at", None, "Score at which a run ends before its budget is spent.")


def _problems() -> list[Problem]:
    parameters = {}
    for flag, of in ((KIND, "ob_zcp"), (FLOCKS, "mocss"), (SEQUENCES, "mocss")):
        if PROBLEM.value.startswith(of):
            parameters[flag.name] = flag.value
        elif flag.present:
            raise app.UsageError(f"--{flag.name} belongs to --problem={of}, not to {PROBLEM.value}.")
    try:
        if OBJECTIVE.value:
            return [CodeObjective(length, OBJECTIVE.value) for length in dict.fromkeys(LENGTH.value)]
        return [problem(PROBLEM.value, length, **parameters) for length in dict.fromkeys(LENGTH.value)]
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


def _search(method: str) -> Search[Any]:
    if method == "surrogate" and POPULATION.value:
        sizes = functools.partial(SurrogateSettings, elites=POPULATION.value, children=POPULATION.value)
        return dataclasses.replace(surrogate.run, defaults=sizes)
    if method == "ga" and POPULATION.value:
        sizes = functools.partial(GeneticSettings, elites=POPULATION.value, children=2 * POPULATION.value)
        return dataclasses.replace(genetic.run, defaults=sizes)
    return METHODS[method]


def _run(searched: Problem, method: str, seed: int) -> SearchResult:
    with tqdm(
        total=BUDGET.value,
        unit="eval",
        unit_scale=True,
        desc=f"N = {searched.length}, {method} seed {seed}",
        leave=False,
    ) as bar:

        def progress(evaluations: int, best: float) -> None:
            bar.set_postfix_str(f"best {best:.4f}", refresh=False)
            bar.update(evaluations - bar.n)

        limits = {"stop_at": STOP_AT.value, "cpu_limit_s": CPU_LIMIT_S.value}
        result = _search(method)(searched, BUDGET.value, seed, progress, **limits)
    if not math.isfinite(result.best):
        raise app.UsageError(f"--budget={BUDGET.value} ends before {method} has scored a code; give it more.")
    return result


def _save(out: pathlib.Path, meta: dict[str, Any], results: Sequence[SearchResult]) -> dict[str, dict[str, Any]]:
    """Writes everything there is; the plots of the last length alone, those of the others stand. Totals by length."""
    rows = [
        {"length": result.problem.length, "method": result.method, "seed": result.seed}
        | point._asdict()
        | {"evaluations_at_chips": result.bill_at_chips(point)}
        for result in results
        for point in result.curve
    ]
    by_length = {
        str(length): comparison.totals([result for result in results if result.problem.length == length])
        for length in dict.fromkeys(result.problem.length for result in results)
    }
    write_result(out, meta, rows, by_length if len(LENGTH.value) > 1 else next(iter(by_length.values())))
    catalogue.write(out / "catalogue.jsonl", [entry for result in results for entry in result.entries])
    _plot(out, [result for result in results if result.problem == results[-1].problem])
    return by_length


def _plot(out: pathlib.Path, results: Sequence[SearchResult]) -> None:
    searched = results[0].problem
    suffix = f"_{searched.length}" if len(LENGTH.value) > 1 else ""
    seeds = len({result.seed for result in results})
    save_curves(
        out / f"curves{suffix}.png",
        f"{searched}: best so far, median and range of {seeds} seed(s)",
        "evaluations",
        OBJECTIVE.value or ("SIR" if searched.target > 0 else "minus residual"),
        comparison.median_curves(results),
        logarithmic=True,
        levels={f"{mark.name} {mark.score:.6g}": mark.score for mark in comparison.marks(searched)},
        ranges=comparison.best_ranges(results),
    )
    path = out / f"classes{suffix}.png"
    path.unlink(missing_ok=True)  # of an earlier run, which may have found what this one has not
    if classes := comparison.class_curves(results):
        title = f"{searched}: classes of hits, all seeds together"
        save_curves(path, title, "evaluations of a run", "classes", classes, logarithmic=True)


def _table(totals: dict[str, Any]) -> list[dict[str, Any]]:
    def text(spread: dict[str, Any]) -> str:
        median, low, high = (
            "-" if spread[name] is None else f"{spread[name]:,.6g}" if spread[name] < 1e5 else f"{spread[name]:,.0f}"
            for name in ("median", "min", "max")
        )
        return f"{median} [{low} to {high}]"

    return [
        {"method": method, "seeds": total["seeds"]}
        | {name: text(total[name]) for name in ("best", "hits", "classes", "evaluations", "cpu_s")}
        | {
            f"{currency} to {mark}": f"{cost['reached']}/{total['seeds']}: {text(cost)}"
            for currency in comparison.CURRENCIES
            for mark, cost in total[f"{currency}_to"].items()
        }
        for method, total in totals.items()
    ]


def main() -> None:
    problems, methods, seeds = _problems(), _methods(), _seeds()
    out, meta = start_result()
    results: list[SearchResult] = []
    totals: dict[str, dict[str, Any]] = {}
    for searched in problems:
        for seed in seeds:
            for method in methods:
                results.append(_run(searched, method, seed))
                totals = _save(out, meta, results)
    for searched in problems:
        title = f"{searched}, {BUDGET.value:,} evaluations; medians [ranges] over seeds"
        print_table(_table(totals[str(searched.length)]), title)


if __name__ == "__main__":
    run(main)
