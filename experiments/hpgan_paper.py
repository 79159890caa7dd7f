"""HpGAN's claims and AlphaSeq's numbers beside ours, on one page: `python -m experiments.hpgan_paper --out=out/hpgan`.

Three tables: the papers' numbers; held-out class recall, of complete lists of complementary codes split by class; and
an ablation of the paper's loop, codec x loss x guidance. The defaults take minutes; every budget is a flag.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import app, flags
from tqdm import tqdm

from experiments.common.plots import save_curves
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from gan import comparison, metrics, paper
from gan.losses import LOSSES
from gan.methods import METHODS
from gan.problems import Problem, problem
from gan.sequences import exhaustive
from gan.training import CODECS

PARTS = ("searches", "held_out", "ablation")
LISTED = {"mocss": 16, "ob_zcp": 19, "ob_zcp_folded": 19}  # largest N of which all codes are listed in seconds
PART = flags.DEFINE_list("part", list(PARTS), f"Tables to compute, some of {', '.join(PARTS)}.")
SEEDS = flags.DEFINE_integer(
    "seeds", 3, "Runs of every search and every ablation, with seeds from --seed on.", lower_bound=1
)
BUDGET = flags.DEFINE_integer("budget", 100_000, "Evaluations of each search at N = 59.", lower_bound=1000)
HELD_OUT = flags.DEFINE_list(
    "held_out",
    ["mocss:8", "ob_zcp:13", "ob_zcp_folded:17"],
    "Problems, as problem:length, whose classes are split into training and held-out classes.",
)
HELD_OUT_BUDGET = flags.DEFINE_integer(
    "held_out_budget", 300_000, "Evaluations of each method on held-out classes.", lower_bound=1000
)
HELD_OUT_STEPS = flags.DEFINE_integer(
    "held_out_steps", 500, "Updates of the GANs on the training classes of --held_out."
)
ABLATION_LENGTH = flags.DEFINE_integer("ablation_length", 31, "Sequence length N of the ablation.", lower_bound=3)
ABLATION_BUDGET = flags.DEFINE_integer("ablation_budget", 4000, "Evaluations of each ablated run.", lower_bound=1000)
CODEC = flags.DEFINE_list("codec", list(CODECS), "Codecs of the ablation.")
LOSS = flags.DEFINE_list("loss", list(LOSSES), "Losses of the ablation.")
METHOD = flags.DEFINE_list("method", list(METHODS), "Searches to compare.")


def _split(text: str, seed: int) -> metrics.Split:
    name, _, length = text.partition(":")
    if name not in LISTED or not length.isdecimal() or int(length) > LISTED[name]:
        raise app.UsageError(
            f"--held_out={text}: write ob_zcp:N or ob_zcp_folded:N with N to {LISTED['ob_zcp']}, or mocss:N with N to "
            f"{LISTED['mocss']}."
        )
    try:
        searched = problem(name, int(length))
        codes = exhaustive.mocss(2, 2, int(length)) if name == "mocss" else exhaustive.optimal_pairs(int(length), 1)
        return metrics.split_by_class(searched, codes.reshape(len(codes), -1)[:, : searched.chips], seed)
    except ValueError as error:
        raise app.UsageError(f"--held_out={text}: {error}") from error


def _searched(seeds: Sequence[int], mmf: Problem) -> list[Any]:
    runs = [(method, seed) for seed in seeds for method in METHOD.value]
    return [METHODS[method](mmf, BUDGET.value, seed) for method, seed in tqdm(runs, desc="searches")]


def _check() -> None:
    for flag, known in ((PART, PARTS), (CODEC, CODECS), (LOSS, LOSSES), (METHOD, METHODS)):
        if unknown := [name for name in flag.value if name not in known]:
            raise app.UsageError(f"--{flag.name}={unknown[0]} is unknown; it must be among {', '.join(known)}.")


def main() -> None:
    _check()
    seeds = range(SEED.value, SEED.value + SEEDS.value)
    splits = [_split(text, SEED.value) for text in HELD_OUT.value] if "held_out" in PART.value else []
    out, meta = start_result()
    items = paper.known_codes()
    totals: dict[str, Any] = {"searches": {}, "held_out": [], "ablation": []}
    if "searches" in PART.value:
        results = _searched(seeds, problem("mmf", 59))
        items += paper.searches(results, BUDGET.value)
        totals["searches"] = comparison.totals(results)
        levels = {mark.name: mark.score for mark in comparison.marks(problem("mmf", 59))}
        curves = comparison.median_curves(results)
        save_curves(out / "curves.png", "N = 59", "evaluations", "SIR", curves, logarithmic=True, levels=levels)
    rows = [dataclasses.asdict(item) for item in items]
    write_result(out, meta, rows, totals)
    print_table(rows, "The papers' numbers and ours")
    for split in tqdm(splits, desc="held out"):
        for seed in seeds:
            totals["held_out"] += paper.held_out(split, METHOD.value, seed, HELD_OUT_STEPS.value, HELD_OUT_BUDGET.value)
            write_result(out, meta, rows, totals)
    if splits:
        print_table(totals["held_out"], "Held-out class recall")
    if "ablation" in PART.value:
        mmf = problem("mmf", ABLATION_LENGTH.value)
        with tqdm(total=len(CODEC.value) * len(LOSS.value) * 2, desc="ablation") as bar:
            for row in paper.ablation(mmf, ABLATION_BUDGET.value, seeds, CODEC.value, LOSS.value, bar.set_postfix_str):
                totals["ablation"].append(row)
                write_result(out, meta, rows, totals)
                bar.update()
        print_table(totals["ablation"], f"The paper's loop at N = {mmf.length}, {ABLATION_BUDGET.value:,} evaluations")


if __name__ == "__main__":
    run(main)
