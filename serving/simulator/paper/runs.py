"""Runs that several tables share."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from serving.conductor import SLO, ConductorConfig
from serving.simulator.config import ClusterConfig
from serving.simulator.performance import Performance, mooncake_a800
from serving.simulator.result import SimulationResult
from serving.simulator.simulation import Simulation
from serving.workload.outcomes import RequestOutcome
from serving.workload.requests import Trace

SLOS = SLO(30.0, 0.1)


def disaggregated(
    trace: Trace,
    conductor: ConductorConfig | None = None,
    prefill: int = 8,
    decode: int = 8,
    performance: Performance | None = None,
) -> SimulationResult:
    """Prefill and decode pools under the paper's SLOs, by Algorithm 1 unless told otherwise."""
    cluster = ClusterConfig(prefill=prefill, decode=decode, conductor=conductor or ConductorConfig(slo=SLOS))
    return Simulation(cluster, performance or mooncake_a800()).run(trace)


def vllm(trace: Trace, nodes: int, decode_scale: float, prefix_cache: bool = False, chunk: int = 0) -> SimulationResult:
    """Coupled nodes, prefill first (or in chunks), requests to the node with the fewest outstanding.

    Decode iterations take 26.3 ms and 0.21 ms per sequence, times `decode_scale`: 1 is what the engine's own
    measurements say, 2 is the factor that fits the paper's curve for the conversation trace and has no mechanism.
    """
    cluster = ClusterConfig(
        prefill=0,
        decode=0,
        coupled=nodes,
        conductor=ConductorConfig(placement="least_loaded", slo=SLOS),
        host_blocks=2000 if prefix_cache else 0,
        chunk=chunk,
        max_batch=256,
    )
    return Simulation(cluster, engine_a800(decode_scale)).run(trace)


def engine_a800(decode_scale: float = 1.0) -> Performance:
    """`mooncake_a800` with the decode cost that single-engine measurements show (FAST'25 Figure 14, arXiv Figure 2)."""
    base = mooncake_a800()
    costs = dataclasses.replace(
        base.costs,
        decode_base=26.3e-3 * decode_scale,
        decode_sequence=0.21e-3 * decode_scale,
        decode_token=base.costs.decode_token * decode_scale,
    )
    return dataclasses.replace(base, costs=costs)


def mean_ttft_s(result: SimulationResult) -> float:
    return float(np.mean([outcome.ttft_s for outcome in result.outcomes if outcome.ttft_s is not None]))


def mean_prefill_s(result: SimulationResult) -> float:
    return result.prefill_s / sum(outcome.ttft_s is not None for outcome in result.outcomes)


def hit_rate(result: SimulationResult) -> float:
    served = [outcome for outcome in result.outcomes if outcome.ttft_s is not None]
    return sum(outcome.hit_tokens for outcome in served) / sum(outcome.input_tokens for outcome in served)


def share_within(outcomes: Sequence[RequestOutcome], tbt_s: float) -> float:
    """Share of all requests whose TBT is at most that; one-token answers have no TBT to miss."""
    met = sum(o.outcome == "completed" and (o.tbt_s is None or o.tbt_s <= tbt_s) for o in outcomes)
    return met / len(outcomes)
