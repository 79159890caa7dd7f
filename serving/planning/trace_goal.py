"""What a trace demands of a deployment, in the few numbers that the planner works with."""

import math
import statistics

from attention_offload.costs.knobs import Knobs
from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.planner.goals import Goal
from kvcache.eviction import LRU
from serving.conductor import SLO
from serving.simulator.hit_rates import replay_hits
from serving.workload.requests import Trace


def trace_goal(
    trace: Trace, knobs: Knobs, slo: SLO, budget_per_hour: float, attainment: float, host_tokens: int
) -> Goal:
    """Returns the goal of serving `trace` at its own rate within `slo`.

    The hit rate is that of one prefill instance's `host_tokens` of KVCache, to which Conductor and other instances only
    add.
    """
    lengths = [(request.input_tokens, request.output_tokens) for request in trace.requests]
    workload = DecodeWorkload.from_lengths(trace.name, lengths)
    blocks = host_tokens // trace.block_size
    return Goal(
        workload=workload,
        budget_per_hour=budget_per_hour,
        ttft_slo_s=slo.ttft_s,
        tbt_slo_s=slo.tbt_s,
        attainment=attainment,
        hit_rate=replay_hits(trace, LRU(blocks)).rate if blocks else 0.0,
        demand_rps=trace_rps(trace),
        dispersion=arrival_dispersion(trace, workload.mean_generated * slo.tbt_s),
        knobs=knobs,
    )


def trace_rps(trace: Trace) -> float:
    """Returns the requests per second of a trace; a trace of a single instant counts as one second."""
    return len(trace.requests) / (trace.duration_s or 1.0)


def arrival_dispersion(trace: Trace, window_s: float) -> float:
    """Returns variance over mean of arrivals in windows of `window_s` seconds: 1 for a Poisson process, 0 for a clock.

    1 where the trace is shorter than ten windows, which say nothing.
    """
    windows = math.floor(trace.duration_s / window_s)
    if windows < 10:
        return 1.0
    counts = [0] * windows
    begin = trace.requests[0].arrival_s
    for request in trace.requests:
        window = int((request.arrival_s - begin) / window_s)
        if window < windows:
            counts[window] += 1
    return statistics.pvariance(counts) / statistics.fmean(counts)
