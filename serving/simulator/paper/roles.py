"""Roles that follow load, against pools that keep their size: where they win, and where they lose."""

import itertools
import pathlib
from collections.abc import Callable

from papers.comparison import Comparison, PaperTable
from papers.confidence import gain
from serving.conductor import ConductorConfig, RoleConfig
from serving.simulator.paper.runs import SLOS, disaggregated
from serving.workload.outcomes import totals
from serving.workload.requests import Trace
from serving.workload.synthetic import Lengths, LoadPhase, phased
from serving.workload.traces import read_trace

_FIXED, _FOLLOWING = ConductorConfig(slo=SLOS), ConductorConfig(slo=SLOS, roles=RoleConfig())
# Long prompts with short answers, and the reverse: four or more of eight nodes must prefill, then five or more decode.
_LONG = LoadPhase(1.0, 3.0, Lengths(10_000), Lengths(20))
_SHORT = LoadPhase(1.0, 3.0, Lengths(500), Lengths(400))
_TOTAL_S = 1200.0


def _effective(trace: Trace, prefill: int, nodes: int, conductor: ConductorConfig) -> float:
    outcomes = disaggregated(trace, conductor, prefill, nodes - prefill).outcomes
    return totals(outcomes, SLOS.ttft_s, SLOS.tbt_s)["effective_ratio"]


def _rows(item: str, make: Callable[[int], Trace], seeds: int, nodes: int, starts: tuple[int, ...]) -> list[Comparison]:
    """Returns rows that compare roles following load, from each of `starts`, with that split fixed and the best one."""
    traces = [make(seed) for seed in range(seeds)]
    # Splits beyond these leave one pool hopelessly short.
    splits = range(nodes // 4, nodes * 3 // 4 + 1)
    fixed = {p: [_effective(trace, p, nodes, _FIXED) for trace in traces] for p in splits}
    best = max(fixed, key=lambda p: sum(fixed[p]))
    rows = []
    for start in starts:
        followed = [_effective(trace, start, nodes, _FOLLOWING) for trace in traces]
        name = f"{item}, from {start}P+{nodes - start}D"
        rows.append(gain(name, fixed[start], followed, "against that split, fixed"))
        rows.append(gain(name, fixed[best], followed, f"against the best fixed split, {best}P+{nodes - best}D"))
    return rows


def _shifting(seconds: float) -> Callable[[int], Trace]:
    def make(seed: int) -> Trace:
        phases = itertools.islice(itertools.cycle((_LONG, _SHORT)), int(_TOTAL_S / seconds))
        return phased([phase.lasting(seconds) for phase in phases], seed=seed)

    return make


def roles(path: pathlib.Path, seeds: int) -> PaperTable:
    """Compares shares of requests within both SLOs. The best fixed split is chosen in hindsight."""

    def conversation(seed: int) -> Trace:
        return read_trace(path, jitter_s=3.0, seed=seed, start=1200 * seed % 6000, limit=6000)

    rows = _rows("conversation", conversation, seeds, 16, (4, 8, 12))
    for seconds in (600.0, 200.0, 60.0, 15.0):
        rows += _rows(f"load that shifts every {seconds:g} s", _shifting(seconds), seeds, 8, (4,))
    return PaperTable("Beyond the paper: roles that follow load", tuple(rows))
