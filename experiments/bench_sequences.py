"""Evaluations of codes per second, by implementation: `python -m experiments.bench_sequences --length=59`.

An evaluation is the score of one complete code. `score` takes unrelated codes; `flips` takes all single-chip flips of a
code at once, and each counts. `cpu kernel` is the C++ kernel, `xla` what other devices run; on the host, `numpy` is
float64 and `exact` rationals, one code after the other. A search is timed whole, with its bookkeeping. All else runs on
JAX's default device. On a CPU the processor seconds of all threads count, so that a core lent to another process does
not; the fastest of the repeats is shown. With an accelerator seconds are those of the clock; it wants a larger --batch.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments.common.flags import define_integers
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from gan import surrogate
from gan.baselines import METHODS
from gan.problems import Problem, problem
from gan.sequences import levinson, neighbours, pulse_compression, sir_kernel

_LENGTH = define_integers("length", [59], "Chips of the mmf codes that are scored.", lower_bound=3)
_BATCH = flags.DEFINE_integer("batch", 16_384, "Codes scored in one call.", lower_bound=1)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each scorer.", lower_bound=1)
_BUDGET = flags.DEFINE_integer("budget", 500_000, "Evaluations of each timed search; 0 times none.", lower_bound=0)

Case = tuple[str, str, str, int, Callable[[], object]]  # problem, what, implementation, evaluations, call


def _seconds(call: Callable[[], object]) -> float:
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    jax.block_until_ready(call())  # the first call compiles
    times = []
    for _ in range(_REPEATS.value):
        start = clock()
        jax.block_until_ready(call())
        times.append(clock() - start)
    return min(times)


def _pulse_compression(length: int) -> Iterator[Case]:
    searched, rng = problem("mmf", length), np.random.default_rng(SEED.value)
    host = searched.random(rng, _BATCH.value)
    few = host[: max(1, _BATCH.value // length)]
    codes, centres = jax.device_put(host), jax.device_put(few)
    score: dict[str, Callable[..., object]] = {"xla": levinson.sir_xla}
    flips: dict[str, Callable[..., object]] = {"xla": neighbours.sir_of_flips_xla}
    if sir_kernel.usable():
        score["cpu kernel"], flips["cpu kernel"] = sir_kernel.sir, sir_kernel.sir_of_flips
    for name, function in score.items():
        yield str(searched), "score", name, len(host), functools.partial(jax.jit(function), codes)
    for name, function in flips.items():
        yield str(searched), "flips", name, few.size, functools.partial(jax.jit(function), centres)
    some = host[:4096]
    yield str(searched), "score", "numpy", len(some), lambda: pulse_compression.sir(some)
    yield str(searched), "score", "exact", 2, lambda: searched.values(host[:2])


def _others() -> Iterator[Case]:
    rng = np.random.default_rng(SEED.value)
    for searched in (problem("ob_zcp", 17), problem("mocss", 16), problem("mocss", 8, flocks=4, sequences=4)):
        host = searched.random(rng, _BATCH.value)
        few = host[: max(1, _BATCH.value // searched.chips)]
        codes, centres = jax.device_put(host), jax.device_put(few)
        yield str(searched), "score", "xla", len(host), functools.partial(searched.score, codes)
        yield str(searched), "flips", "xla", few.size, functools.partial(searched.score_flips, centres)


def _searches(length: int) -> Iterator[Case]:
    searched: Problem = problem("mmf", length)
    for name, method in {**METHODS, "surrogate": surrogate.run}.items():
        # The network of the surrogate search takes most of its time: less is enough to time it.
        budget = max(1, _BUDGET.value // 25) if name == "surrogate" else _BUDGET.value
        yield str(searched), "search", name, budget, functools.partial(method, searched, budget, SEED.value)


def _row(case: Case) -> dict[str, Any]:
    searched, what, implementation, evaluations, call = case
    seconds = _seconds(call)
    return {
        "problem": searched,
        "what": what,
        "implementation": implementation,
        "evaluations": evaluations,
        "seconds": seconds,
        "evaluations_per_s": evaluations / seconds,
    }


def main() -> None:
    out, meta = start_result()
    rows = [_row(case) for length in _LENGTH.value for case in _pulse_compression(length)]
    rows += [_row(case) for case in _others()]
    if _BUDGET.value:
        rows += [_row(case) for length in _LENGTH.value for case in _searches(length)]
    per = "core-second" if jax.default_backend() == "cpu" else "second"
    print_table(rows, f"Evaluations per {per} on {jax.devices()[0].device_kind}")
    write_result(out, meta, rows)


if __name__ == "__main__":
    run(main)
