"""A plan of the cost model as instances that the cluster simulator runs, offloaded decode among them."""

import itertools

import numpy as np

from attention_offload.costs.deployments import DecodeDeployment, OffloadedDeployment
from attention_offload.costs.experts import ExpertPoolDeployment
from attention_offload.costs.shapes import ModelShape
from attention_offload.planner.goals import Goal
from attention_offload.planner.search import Plan
from serving.conductor import TimeModel
from serving.simulator.decode_table import DecodeTable
from serving.simulator.performance import Performance

# Host memory and SSD to the devices of one instance, bytes per second.
LOAD_BANDWIDTH, SSD_BANDWIDTH = 50e9, 6e9
# Knots of the decode table are this far apart, as a ratio, from one sequence and this context on.
_RATIO, _SHORTEST = 1.15, 64.0
_LONGEST = 200_000.0


def plan_performance(plan: Plan, goal: Goal) -> Performance:
    """Returns the instances of `plan` as one `Performance`, of which each pool reads its own figures.

    Decode iterations are the cost model's steps, in a table; what the Conductor believes of them is the line closest
    to it where the plan operates. Prefill times are fitted (the error is in `source`). KV of prompts travels at the
    rate of the slower pool's NICs, less what attention sends through those of an offloaded instance.
    """
    shape, knobs, context = plan.shape, goal.knobs, goal.workload.context
    prefill, prefill_error = _fit_prefill(plan, goal)
    table = decode_table(plan.decode, shape, goal, largest=plan.max_batch)
    base, sequence, token = _fit_decode(table, plan.batch, context)
    nics = plan.prefill.count * plan.prefill.device.network_bandwidth * knobs.network.efficiency
    kv_bytes = shape.kv_bytes_per_token
    costs = TimeModel(
        prefill_base=prefill[0],
        prefill_token=prefill[1],
        prefill_pair=prefill[2],
        prefill_reused=0.0,
        decode_base=base,
        decode_sequence=sequence,
        decode_token=token,
        transfer_token=kv_bytes / min(nics, _receive_bandwidth(plan, goal)),
    )
    held = kv_bytes * shape.attended(context) / context
    return Performance(
        costs=costs,
        load_token=kv_bytes / LOAD_BANDWIDTH,
        ssd_token=kv_bytes / SSD_BANDWIDTH,
        kv_capacity_tokens=int(plan.decode.kv_bytes(shape, knobs) / held),
        layers=shape.num_layers,
        source=f"cost model ({knobs.name}); prefill fitted within {prefill_error:.0%}",
        decode_table=table,
    )


def decode_table(deployment: DecodeDeployment, shape: ModelShape, goal: Goal, largest: float) -> DecodeTable:
    """Returns the deployment's step times over batches up to `largest` or more and contexts up to 200,000 tokens."""
    batches, contexts = _knots(1.0, max(largest, 2.0)), _knots(_SHORTEST, _LONGEST)
    seconds = np.array([[deployment.decode_step(shape, b, c, goal.knobs).tbt_s for c in contexts] for b in batches])
    # Rounding must not make a longer context faster.
    seconds = np.maximum.accumulate(seconds, axis=1)
    return DecodeTable(batches, contexts, tuple(map(tuple, seconds.tolist())))


def _knots(first: float, last: float) -> tuple[float, ...]:
    """Returns whole numbers from `first` to `last` or a little more; each is `_RATIO` times, or one above, the last."""
    knots = [round(first)]
    while knots[-1] < last:
        knots.append(max(knots[-1] + 1, round(knots[-1] * _RATIO)))
    return tuple(map(float, knots))


def _fit_prefill(plan: Plan, goal: Goal) -> tuple[tuple[float, float, float], float]:
    """Returns base, token and pair coefficients closest to the prefill times, and the largest relative error.

    Errors are weighed between relative and absolute, so that the seconds of a whole trace come out right.
    """
    points = [(n, n * cached) for n, cached in itertools.product(goal.workload.prompts, (0.0, 0.5))]
    seconds = np.array([plan.prefill.seconds(plan.shape, n, cached, goal.knobs) for n, cached in points])
    features = np.array([(1.0, n - cached, n * n - cached * cached) for n, cached in points])
    fitted = _non_negative(features, seconds, seconds**-0.5)
    error = float(np.max(np.abs(features @ fitted / seconds - 1)))
    base, token, pair = fitted.tolist()
    return (base, token, pair), error


def _fit_decode(table: DecodeTable, batch: float, context: float) -> tuple[float, float, float]:
    """Returns base, sequence and token coefficients closest to the table around a batch and a context."""
    points = [(b, c) for b in table.batches if b <= 2 * batch for c in table.contexts if c <= 4 * context]
    seconds = np.array([table.decode_s(b, b * c) for b, c in points])
    fitted = _non_negative(np.array([(1.0, b, b * c) for b, c in points]), seconds, 1 / seconds)
    base, sequence, token = fitted.tolist()
    return base, sequence, token


def _non_negative(features: np.ndarray, seconds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Solves weighted least squares without negative coefficients: leaves out a feature that would get one."""
    kept = list(range(features.shape[1]))
    while True:
        weighted = features[:, kept] * weights[:, None]
        scales = np.abs(weighted).max(axis=0)
        fitted = np.linalg.lstsq(weighted / scales, seconds * weights, rcond=None)[0] / scales
        if (fitted >= 0).all():
            coefficients = np.zeros(features.shape[1])
            coefficients[kept] = fitted
            return coefficients
        kept.pop(int(np.argmin(fitted * scales)))


def _receive_bandwidth(plan: Plan, goal: Goal) -> float:
    """Returns the bytes per second that the devices holding KV have left for KV of prompts."""
    deployment, knobs, shape = plan.decode, goal.knobs, plan.shape
    bandwidth = deployment.kv_network_bandwidth * knobs.network.efficiency
    base = deployment.base if isinstance(deployment, ExpertPoolDeployment) else deployment
    if not isinstance(base, OffloadedDeployment):
        return bandwidth
    step_s = deployment.decode_step(shape, plan.batch, goal.workload.context, knobs).tbt_s
    arriving = plan.batch * shape.num_layers * (shape.query_bytes + shape.kv_crossing_bytes) / step_s
    # Attention leaves at least a tenth: KV is fetched whenever no query waits.
    return max(bandwidth - arriving, bandwidth / 10)
