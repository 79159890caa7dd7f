"""Requests per second that a decode instance and a prefill pool carry within their latency targets, and what binds."""

import dataclasses
import math
import statistics
from collections.abc import Callable

from attention_offload.costs.experts import ExpertPoolInstance
from attention_offload.costs.instances import DecodeInstance, DecodeStep, OffloadedInstance, max_batch
from attention_offload.costs.knobs import Knobs
from attention_offload.costs.operators import prefill_time
from attention_offload.costs.shapes import ModelShape
from attention_offload.devices import Device
from attention_offload.planner.goals import Goal


@dataclasses.dataclass(frozen=True)
class DecodeRate:
    """The requests per second that an instance finishes, a step with its mean and with its fullest batch, what binds."""

    rps: float
    step: DecodeStep
    fullest: DecodeStep
    binds: str


@dataclasses.dataclass(frozen=True)
class PrefillInstance:
    """`count` devices that prefill one prompt at a time, tensor-parallel; `slowdown` is what helping decode costs."""

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
    """The largest integer in [low, high] that `fits`, where all up to it do; `low - 1` if none does."""
    if fits(high):
        return high
    low -= 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def decode_rate(instance: DecodeInstance, shape: ModelShape, goal: Goal) -> DecodeRate | None:
    """What `instance` carries of the goal's workload; None where not even one sequence meets TBT.

    The fullest batch is what memory and TBT allow. The mean one leaves room for chance: sequences come and go like
    customers of an M/G/infinity queue, so what they hold varies by its square root, more where contexts differ, and is
    to fit for `attainment` of the time.

    Raises `CapacityError` where weights or a single request do not fit.
    """
    context, knobs = goal.workload.context, goal.knobs
    most = max_batch(instance, shape, context, knobs)
    batch = largest(lambda batch: instance.step(shape, batch, context, knobs).tbt_s <= goal.tbt_slo_s, 1, most)
    if batch < 1:
        return None
    fullest = instance.step(shape, batch, context, knobs)
    step = instance.step(shape, mean_occupancy(batch, goal), context, knobs)
    finished, received = step.tokens_per_s / goal.workload.mean_generated, _receive_rate(instance, shape, goal)
    limit = "memory" if batch == most else "TBT SLO"
    binds = "network, KV of prompts" if received < finished else f"{limit}, {_longest_part(fullest)}"
    return DecodeRate(min(finished, received), step, fullest, binds)


def mean_occupancy(room: float, goal: Goal) -> float:
    """The m for which m + z sqrt(m (1 + spread^2)) = room, z the normal quantile of the attainment."""
    deviations = statistics.NormalDist().inv_cdf(goal.attainment) * math.hypot(1.0, goal.workload.context_spread)
    return ((math.sqrt(deviations**2 + 4 * room) - deviations) / 2) ** 2


def _receive_rate(instance: DecodeInstance, shape: ModelShape, goal: Goal) -> float:
    """Requests per second whose KV the instance's NICs can take in, beside what attention sends through them."""
    moved = goal.workload.mean_prompt * shape.kv_bytes_per_token
    base = instance.base if isinstance(instance, ExpertPoolInstance) else instance
    if isinstance(base, OffloadedInstance):
        moved += goal.workload.mean_generated * shape.num_layers * shape.crossing_bytes
    return instance.kv_network_bandwidth * goal.knobs.network.efficiency / moved


def _longest_part(step: DecodeStep) -> str:
    """The part of a step that takes longest; what hides behind other work does not count."""
    parts = {
        "dense": step.dense_s,
        "attention bandwidth": step.attention_s,
        "network": step.network_s - step.overlap_s,
        "host": step.overhead_s,
    }
    return max(parts, key=lambda part: parts[part])


def prefill_rate(pool: PrefillInstance, count: int, shape: ModelShape, goal: Goal) -> float:
    """Requests per second whose TTFT `count` instances keep, first come first served.

    A prompt that alone takes longer than the target is never counted, but costs its time. Of the others, `attainment`
    are to meet it with their own time and the wait in an M/G/k queue (chance and mean of a wait by Sakasegawa's
    approximation, waits exponential).
    """
    times = prompt_seconds(pool, shape, goal)
    mean = statistics.fmean(times)
    variability = statistics.fmean(time * time for time in times) / mean**2 / 2
    best = 0.0
    for kept, time in enumerate(times, start=1):
        allowed = goal.ttft_slo_s - time
        if allowed > 0:
            busiest = _busiest(count, allowed / (mean * variability), goal.attainment)
            best = max(best, busiest * count / mean * kept / len(times))
    sent = goal.workload.mean_prompt * shape.kv_bytes_per_token
    return min(best, count * pool.count * pool.device.network_bandwidth * goal.knobs.network.efficiency / sent)


def prompt_seconds(pool: PrefillInstance, shape: ModelShape, goal: Goal) -> list[float]:
    """Prefill seconds of the workload's representative prompts, shortest first."""
    return [pool.seconds(shape, p, goal.hit_rate * p, goal.knobs) for p in goal.workload.prompts]


def _busiest(servers: int, wait: float, share: float) -> float:
    """The largest utilisation of an M/M/k queue in which `share` of the customers wait at most `wait` service times."""
    power = math.sqrt(2 * (servers + 1)) - 1
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if middle**power * math.exp(-wait * servers * (1 - middle)) <= 1 - share:
            low = middle
        else:
            high = middle
    return low
