"""Requests per second that a decode instance and a prefill pool carry within their latency targets, and what binds."""

import dataclasses
import math
import statistics
from collections.abc import Callable

import numpy as np

from attention_offload.costs.deployments import DecodeDeployment, DecodeStep, OffloadedDeployment, max_batch
from attention_offload.costs.experts import ExpertPoolDeployment
from attention_offload.costs.knobs import Knobs
from attention_offload.costs.operators import prefill_time
from attention_offload.costs.shapes import ModelShape
from attention_offload.devices import Device
from attention_offload.planner.goals import Goal

# Batches at which an instance's speed is looked up, and the bisection of its rate: to 1 / 17^3 of the highest.
_POINTS, _CANDIDATES, _ROUNDS = 10, 16, 3


@dataclasses.dataclass(frozen=True)
class DecodeRate:
    """Requests per second that an instance finishes, its mean batch, a step with its fullest one, and what binds."""

    rps: float
    batch: float
    fullest: DecodeStep
    binds: str


@dataclasses.dataclass(frozen=True)
class PrefillDeployment:
    """The devices of one prefill instance: `count` of one kind, tensor-parallel, one prompt at a time.

    `slowdown` is the share by which helping decode lengthens a prefill.
    """

    device: Device
    count: int
    slowdown: float = 0.0

    @property
    def price_per_hour(self) -> float:
        return self.count * self.device.price_per_hour

    @property
    def label(self) -> str:
        return f"{self.count}x{self.device.name}"

    def seconds(self, shape: ModelShape, tokens: float, cached: float, knobs: Knobs) -> float:
        return (1 + self.slowdown) * prefill_time(shape, self.device, self.count, tokens, cached, knobs)


def largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Returns the largest integer in [low, high] that `fits`, if all below it fit too; `low - 1` if none does."""
    if fits(high):
        return high
    low -= 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def decode_rate(deployment: DecodeDeployment, shape: ModelShape, goal: Goal) -> DecodeRate | None:
    """Returns the rate that one instance of `deployment` carries; None where not even one sequence meets TBT.

    The fullest batch is what memory and TBT allow. A sequence joins between two steps, so its first gap is half a step
    longer than a step on average; its TBT, the mean of the longest tenth of its gaps, contains it. The rate is the one
    at which `attainment` of the arrivals find room in that batch.

    Raises `CapacityError` where weights or a single request do not fit.
    """
    workload, knobs = goal.workload, goal.knobs
    most = max_batch(deployment, shape, workload.reserved, knobs)
    counted = max(1, int(workload.mean_generated) // 10)
    allowed_s = goal.tbt_slo_s / (1 + 0.5 / counted)
    fullest = _fullest_step(deployment, shape, goal, allowed_s, most)
    if fullest is None:
        return None
    batches = np.unique(np.geomspace(1, fullest.batch, _POINTS))
    tok_s = [deployment.decode_step(shape, batch, workload.context, knobs).tokens_per_s for batch in batches.tolist()]
    finished, mean = attained_rate(batches, np.array(tok_s) / workload.mean_generated, goal)
    received = _receive_rate(deployment, shape, goal)
    limit = "memory" if fullest.batch == most else "TBT SLO"
    binds = "network, KV of prompts" if received < finished else f"{limit}, {_longest_part(fullest)}"
    return DecodeRate(min(finished, received), mean, fullest, binds)


def _fullest_step(
    deployment: DecodeDeployment, shape: ModelShape, goal: Goal, allowed_s: float, most: int
) -> DecodeStep | None:
    """Returns the step with the largest batch, up to `most`, that takes at most `allowed_s`."""
    context, knobs = goal.workload.context, goal.knobs
    batch = largest(lambda batch: deployment.decode_step(shape, batch, context, knobs).tbt_s <= allowed_s, 1, most)
    return deployment.decode_step(shape, batch, context, knobs) if batch else None


def attained_rate(batches: np.ndarray, finished_rps: np.ndarray, goal: Goal) -> tuple[float, float]:
    """Returns the rate at which `attainment` of arrivals find fewer than `batches[-1]` sequences, and the mean batch.

    Sequences share the instance, which finishes `finished_rps` requests per second at `batches`: a queue with processor
    sharing, whose occupancy is that of a birth-death process whatever the lengths are (Cohen 1979). Arrivals in bursts
    and unequal contexts make it vary more; they are taken as sequences that come and go `dispersion` + spread^2 at a
    time. Beyond the fullest batch, sequences wait.
    """
    fullest = float(batches[-1])
    states = max(1, round(fullest / (goal.dispersion + goal.workload.context_spread**2)))
    occupied = np.linspace(fullest / states, fullest, states)
    served = np.interp(occupied, batches, finished_rps)
    # log of the product of served rates, per state, relative to the fastest.
    slowed = np.concatenate([[0.0], np.cumsum(np.log(served / served[-1]))])
    busy = np.concatenate([[0.0], occupied])
    low, high, mean = 0.0, 1.0, 0.0
    for _ in range(_ROUNDS):
        loads = np.linspace(low, high, _CANDIDATES + 2)[1:-1]
        weights = np.arange(states + 1)[None] * np.log(loads)[:, None] - slowed[None]
        chances = np.exp(weights - weights.max(axis=1, keepdims=True))
        chances[:, -1] /= 1 - loads
        chances /= chances.sum(axis=1, keepdims=True)
        kept = int(np.sum(1 - chances[:, -1] >= goal.attainment))
        if kept:
            low, mean = float(loads[kept - 1]), float(chances[kept - 1] @ busy)
        high = float(loads[kept]) if kept < _CANDIDATES else high
    return low * float(served[-1]), mean


def _receive_rate(deployment: DecodeDeployment, shape: ModelShape, goal: Goal) -> float:
    """Returns requests per second whose KV the instance's NICs can receive, beside the traffic of attention."""
    moved = goal.workload.mean_prompt * shape.kv_bytes_per_token
    base = deployment.base if isinstance(deployment, ExpertPoolDeployment) else deployment
    if isinstance(base, OffloadedDeployment):
        moved += goal.workload.mean_generated * shape.num_layers * shape.crossing_bytes
    return deployment.kv_network_bandwidth * goal.knobs.network.efficiency / moved


def _longest_part(step: DecodeStep) -> str:
    """Returns the longest part of a step, without what hides behind other work."""
    parts = {
        "dense": step.dense_s,
        "attention bandwidth": step.attention_s,
        "network": step.network_s - step.overlap_s,
        "host": step.overhead_s,
    }
    return max(parts, key=lambda part: parts[part])


def prefill_rate(pool: PrefillDeployment, count: int, shape: ModelShape, goal: Goal) -> float:
    """Returns the requests per second whose TTFT target `count` instances keep, first come first served.

    A prompt that alone takes longer than the target is never counted, but costs its time. Of the others, `attainment`
    are to meet it with their own time and the wait in a G/G/k queue (chance and mean of a wait by Sakasegawa's
    approximation, waits exponential).
    """
    times = prompt_seconds(pool, shape, goal)
    mean = statistics.fmean(times)
    variability = (goal.dispersion + statistics.pvariance(times) / mean**2) / 2
    best = 0.0
    for kept, time in enumerate(times, start=1):
        allowed = goal.ttft_slo_s - time
        if allowed > 0:
            busiest = _busiest(count, allowed / (mean * max(variability, 1e-9)), goal.attainment)
            best = max(best, busiest * count / mean * kept / len(times))
    sent = goal.workload.mean_prompt * shape.kv_bytes_per_token
    return min(best, count * pool.count * pool.device.network_bandwidth * goal.knobs.network.efficiency / sent)


def prompt_seconds(pool: PrefillDeployment, shape: ModelShape, goal: Goal) -> list[float]:
    """Prefill seconds of the workload's representative prompts, shortest first."""
    return [pool.seconds(shape, p, goal.hit_rate * p, goal.knobs) for p in goal.workload.prompts]


def _busiest(servers: int, wait: float, share: float) -> float:
    """Returns the largest utilisation of an M/M/k queue at which `share` of customers wait at most `wait` services."""
    power = math.sqrt(2 * (servers + 1)) - 1
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if middle**power * math.exp(-wait * servers * (1 - middle)) <= 1 - share:
            low = middle
        else:
            high = middle
    return low
