"""Plans put to the test: a cluster of their instances serves the trace, and the simulator says what it attained."""

import dataclasses
from collections.abc import Callable

from attention_offload.planner.goals import Goal
from attention_offload.planner.search import Plan
from serving.conductor import SLO, ConductorConfig
from serving.planning.deployment import plan_performance
from serving.planning.trace_goal import trace_rps
from serving.simulator.config import ClusterConfig
from serving.simulator.performance import Performance
from serving.simulator.simulation import Simulation
from serving.workload.outcomes import totals
from serving.workload.requests import Trace

CONFIRMED, REFUTED = "confirmed", "refuted"
# The sustained rate is found to within this ratio, and looked for up to this factor around the planned rate.
_RESOLUTION, _WIDEST = 1.05, 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulatedRun:
    """How a simulated cluster served a trace at one rate.

    Attributes:
        offered_rps: arrivals per second.
        attainment, ttft_attainment, tbt_attainment: shares of all requests within both targets, and within either.
        ttft_p90_s, tbt_p90_s: 90th percentiles, in seconds; `None` where no request was served.
        hit_rate: share of prompt tokens whose KV was reused.
        rejected: requests refused.
    """

    offered_rps: float
    attainment: float
    ttft_attainment: float
    tbt_attainment: float
    ttft_p90_s: float | None
    tbt_p90_s: float | None
    hit_rate: float
    rejected: int

    @property
    def goodput_rps(self) -> float:
        """Requests per second within both targets."""
        return self.offered_rps * self.attainment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confirmation:
    """How a plan's cluster serves the trace at the planned rate, the rate that it sustains, and the verdict.

    `sustained_rps` is the highest rate found at which `attainment` of the requests keep both targets.
    """

    plan: Plan
    run: SimulatedRun
    sustained_rps: float
    verdict: str
    reason: str


def at_rate(trace: Trace, rps: float) -> Trace:
    """Returns the same requests with arrival times stretched to `rps` requests per second on average."""
    factor = trace_rps(trace) / rps
    requests = tuple(dataclasses.replace(r, arrival_s=r.arrival_s * factor) for r in trace.requests)
    return dataclasses.replace(trace, requests=requests)


def try_cluster(trace: Trace, cluster: ClusterConfig, performance: Performance) -> SimulatedRun:
    """Serves `trace` in simulation; the targets are those of the cluster's Conductor."""
    slo = cluster.conductor.slo
    outcomes = Simulation(cluster, performance).run(trace).outcomes
    summary = totals(outcomes, slo.ttft_s, slo.tbt_s)

    def within(name: str, limit: float) -> float:
        served = (o for o in outcomes if o.ttft_s is not None)
        return sum((getattr(o, name) or 0.0) <= limit for o in served) / len(outcomes)

    return SimulatedRun(
        offered_rps=trace_rps(trace),
        attainment=summary["effective_ratio"],
        ttft_attainment=within("ttft_s", slo.ttft_s),
        tbt_attainment=within("tbt_s", slo.tbt_s),
        ttft_p90_s=summary["ttft_s"]["p90"],
        tbt_p90_s=summary["tbt_s"]["p90"],
        hit_rate=summary["hit_rate"],
        rejected=summary["rejected"],
    )


def confirm(
    plan: Plan, goal: Goal, trace: Trace, host_tokens: int, progress: Callable[[float], object] | None = None
) -> Confirmation:
    """Serves `trace` with the plan's instances, at the planned rate and then around it.

    Each prefill instance has a KVCache of `host_tokens`. `progress` is told every rate that is tried.
    """
    conductor = ConductorConfig(slo=SLO(goal.ttft_slo_s, goal.tbt_slo_s))
    blocks = host_tokens // trace.block_size
    cluster = ClusterConfig(
        prefill=plan.prefill_count,
        decode=plan.decode_count,
        conductor=conductor,
        host_blocks=blocks,
        max_batch=plan.max_batch,
    )
    performance = plan_performance(plan, goal)

    def attempt(rps: float) -> SimulatedRun:
        if progress is not None:
            progress(rps)
        return try_cluster(at_rate(trace, rps), cluster, performance)

    run = attempt(plan.goodput_rps / plan.answerable)
    wanted = goal.attainment * plan.answerable
    sustained = sustained_rate(run.offered_rps, run.attainment >= wanted, lambda rps: attempt(rps).attainment >= wanted)
    verdict = CONFIRMED if run.attainment >= wanted else REFUTED
    return Confirmation(plan=plan, run=run, sustained_rps=sustained, verdict=verdict, reason=missed(run))


def sustained_rate(planned: float, kept: bool, keeps: Callable[[float], bool]) -> float:
    """Returns the highest rate that `keeps`, near `planned`; 0 where none down to a sixteenth does."""
    low, high = (planned, None) if kept else (0.0, planned)
    factor = 1.25
    while low == 0.0 or high is None:
        rate = planned * factor if kept else planned / factor
        if factor > _WIDEST:
            return low
        if keeps(rate):
            low = rate
        else:
            high = rate
        factor *= 1.25
    while high / low > _RESOLUTION:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low


def missed(run: SimulatedRun) -> str:
    """Says which target fewer requests keep, and how many keep it."""
    refused = f"; {run.rejected} refused: no room for their KV" if run.rejected else ""
    worse = "TTFT" if run.ttft_attainment <= run.tbt_attainment else "TBT"
    share = min(run.ttft_attainment, run.tbt_attainment)
    return f"{worse} within its target for {share:.1%} of the requests{refused}"
