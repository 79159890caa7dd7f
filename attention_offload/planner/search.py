"""The search: rates of every candidate, the undominated ones, and the pools that they make within a budget."""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from attention_offload.costs.deployments import DecodeDeployment
from attention_offload.costs.shapes import ModelShape
from attention_offload.errors import CapacityError, OffloadError
from attention_offload.planner.goals import Goal
from attention_offload.planner.rates import DecodeRate, PrefillDeployment, decode_rate, prefill_rate, prompt_seconds
from attention_offload.planner.space import DecodeOption, Space

# Up to this many splits all are evaluated; beyond it the search climbs from random starts.
EXACT_LIMIT = 20_000
_STARTS = 40

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Instances to rent, and what the cost model expects of them.

    `goodput_rps` counts requests within both latency targets; `batch` is the mean one of a decode instance, `max_batch`
    its fullest and `tbt_s` a step with that; `ttft_s` is the prefill of a mean prompt without waiting; `answerable` the
    share of the prompts whose prefill alone is within the target; `binds` names the pool, then what limits it.
    """

    prefill: PrefillDeployment
    prefill_count: int
    decode: DecodeDeployment
    decode_count: int
    shape: ModelShape
    goodput_rps: float
    batch: float
    max_batch: int
    tbt_s: float
    ttft_s: float
    answerable: float
    binds: str

    @property
    def price_per_hour(self) -> float:
        return self.prefill_count * self.prefill.price_per_hour + self.decode_count * self.decode.price_per_hour

    @property
    def requests_per_dollar(self) -> float:
        return 3600 * self.goodput_rps / self.price_per_hour

    @property
    def label(self) -> str:
        return f"{self.prefill_count}*({self.prefill.label}) -> {self.decode_count}*({self.decode.label})"


@dataclasses.dataclass(frozen=True)
class RatedOption:
    """A way to decode, and what it carries."""

    option: DecodeOption
    rate: DecodeRate

    @property
    def price(self) -> float:
        return self.option.deployment.price_per_hour

    @property
    def requests_per_dollar(self) -> float:
        return 3600 * self.rate.rps / self.price


def search(goal: Goal, space: Space, *, exact_limit: int = EXACT_LIMIT, seed: int = 0) -> list[Plan]:
    """Returns the frontier of plans by price and goodput, cheapest first; tries every split up to `exact_limit`.

    Larger spaces are searched by hill climbing over the splits from random starts, with `seed`. Raises `CapacityError`
    when the model fits nowhere, `OffloadError` when no plan meets the targets within the budget.
    """
    rater = _Rater(goal)
    rated = _rate_options(rater, space, exact_limit, seed)
    plans = [plan for prefill in space.prefill() for plan in _plans(goal, prefill, rated)]
    best = _frontier(plans)
    if best:
        return best
    if rater.too_small and not rater.fits:
        within = f"within ${goal.budget_per_hour}/h"
        raise CapacityError(f"{space.shapes[0].name} fits on nothing offered {within}. For example: {rater.too_small}")
    tightest = f"TTFT {goal.ttft_slo_s} s, TBT {goal.tbt_slo_s} s, ${goal.budget_per_hour}/h"
    raise OffloadError(f"No plan meets {tightest}. Raise the budget or a target, or offer other devices.")


def rate_decode(goal: Goal, space: Space, *, exact_limit: int = EXACT_LIMIT, seed: int = 0) -> list[RatedOption]:
    """Returns the ways to decode that `search` considers and that meet the TBT target, the best per dollar first."""
    rated = _rate_options(_Rater(goal), space, exact_limit, seed)
    return sorted(rated, key=lambda one: -one.requests_per_dollar)


class _Rater:
    """Rates options, and remembers whether any held the model, and why the first that did not was too small."""

    def __init__(self, goal: Goal) -> None:
        self.goal = goal
        self.fits = False
        self.too_small: CapacityError | None = None

    def __call__(self, option: DecodeOption | None) -> RatedOption | None:
        """Returns the option's rate; None where it does not fit, cannot be split that way, or misses the TBT target."""
        if option is None or option.deployment.price_per_hour > self.goal.budget_per_hour:
            return None
        try:
            rate = decode_rate(option.deployment, option.shape, self.goal)
        except CapacityError as error:
            self.too_small = self.too_small or error
            return None
        except OffloadError:
            return None
        self.fits = True
        return RatedOption(option, rate) if rate else None


def _rate_options(rater: _Rater, space: Space, exact_limit: int, seed: int) -> list[RatedOption]:
    spread = rater.goal.workload.context_spread
    helped = space.partial(rater.goal.knobs.helper_prefill_slowdown)
    fixed = itertools.chain(space.coupled(), space.experts(), helped)
    if math.prod(len(axis) for axis in space.offloaded_axes()) <= exact_limit:
        splits: Iterable[RatedOption | None] = map(rater, space.offloaded(spread))
    else:
        splits = _climb(space, lambda axes: rater(space.offloaded_option(axes, spread)), seed)
    return [rated for rated in itertools.chain(map(rater, fixed), splits) if rated]


def _climb(space: Space, evaluate: Callable[[tuple], RatedOption | None], seed: int) -> Iterator[RatedOption]:
    """Yields every split met while climbing requests per dollar, one axis at a time, from random starts."""
    axes, rng = space.offloaded_axes(), random.Random(seed)
    met: dict[tuple[int, ...], RatedOption | None] = {}

    def value(place: tuple[int, ...]) -> float:
        if place not in met:
            met[place] = evaluate(tuple(axis[index] for axis, index in zip(axes, place, strict=True)))
        rated = met[place]
        return rated.rate.rps / rated.price if rated else -1.0

    for _ in range(_STARTS):
        place, before = tuple(rng.randrange(len(axis)) for axis in axes), -2.0
        while value(place) > before:
            before = value(place)
            place = max((place, *_line_moves(place, axes)), key=value)
    return (rated for rated in met.values() if rated)


def _line_moves(place: tuple[int, ...], axes: Sequence[Sequence]) -> Iterator[tuple[int, ...]]:
    """Places that differ in one axis: all values of short axes, neighbours and far jumps on long ones."""
    for position, axis in enumerate(axes):
        here = place[position]
        steps = range(len(axis)) if len(axis) <= 8 else {here - 8, here - 2, here - 1, here + 1, here + 2, here + 8}
        for index in steps:
            if 0 <= index < len(axis) and index != here:
                yield (*place[:position], index, *place[position + 1 :])


def _plans(goal: Goal, prefill: PrefillDeployment, rated: Sequence[RatedOption]) -> Iterator[Plan]:
    """Yields plans with one kind of prefill instance in which one pool is just large enough for the other."""
    by_shape: dict[ModelShape, list[RatedOption]] = {}
    for option in rated:
        by_shape.setdefault(option.option.shape, []).append(option)
    for shape, options in by_shape.items():
        alone = [option for option in options if option.option.helped_by is None]
        yield from _pools(goal, prefill, shape, _undominated(alone))
        for helped in options:
            slowed = helped.option.helped_by
            if slowed and (slowed.device, slowed.count) == (prefill.device, prefill.count):
                yield from _pools(goal, slowed, shape, [helped])


def _pools(goal: Goal, prefill: PrefillDeployment, shape: ModelShape, options: Sequence[RatedOption]) -> Iterator[Plan]:
    budget = goal.budget_per_hour
    try:
        most = int(budget / prefill.price_per_hour)
        times = prompt_seconds(prefill, shape, goal)
        if not options or not _holds_weights(prefill, shape, goal):
            return
        carried = [prefill_rate(prefill, count, shape, goal) for count in range(1, most + 1)]
    except OffloadError:
        return
    ttft_s = sum(times) / len(times)
    answerable = sum(time < goal.ttft_slo_s for time in times) / len(times)
    for rated in options:
        for prefills, decodes in _balanced(carried, rated, prefill.price_per_hour, goal):
            supply = min(carried[prefills - 1], goal.demand_rps)
            rps = min(supply, decodes * rated.rate.rps)
            binds = (
                f"decode: {rated.rate.binds}" if decodes * rated.rate.rps <= supply else "prefill: TTFT SLO, compute"
            )
            if rps == goal.demand_rps:
                binds = "demand"
            fullest = rated.rate.fullest
            yield Plan(
                prefill=prefill,
                prefill_count=prefills,
                decode=rated.option.deployment,
                decode_count=decodes,
                shape=shape,
                goodput_rps=rps,
                batch=rated.rate.batch,
                max_batch=int(fullest.batch),
                tbt_s=fullest.tbt_s,
                ttft_s=ttft_s,
                answerable=answerable,
                binds=binds,
            )


def _balanced(carried: Sequence[float], rated: RatedOption, prefill_price: float, goal: Goal) -> set[tuple[int, int]]:
    """Pairs of counts that can be on the frontier: a smaller pool would carry less, a larger one is not needed."""
    pairs = set()
    affordable, helpers = int(goal.budget_per_hour / rated.price), rated.option.helpers
    for prefills, rate in enumerate(carried, start=1):
        decodes = math.ceil(min(rate, goal.demand_rps) / rated.rate.rps)
        decodes = min(decodes, prefills // helpers) if helpers else decodes
        pairs |= {(prefills, decodes), (prefills, decodes - 1)}
    prefills = 1
    for decodes in range(1, affordable + 1):
        while prefills < len(carried) and carried[prefills - 1] < min(decodes * rated.rate.rps, goal.demand_rps):
            prefills += 1
        needed = max(prefills, decodes * helpers)
        pairs |= {(needed, decodes), (needed - 1, decodes)}
    return {
        (prefills, decodes)
        for prefills, decodes in pairs
        if 1 <= prefills <= len(carried)
        and decodes >= 1
        and prefills >= decodes * helpers
        and prefills * prefill_price + decodes * rated.price <= goal.budget_per_hour
        and carried[prefills - 1] > 0
    }


def _holds_weights(prefill: PrefillDeployment, shape: ModelShape, goal: Goal) -> bool:
    usable = goal.knobs.coupled_memory_share * prefill.count * prefill.device.memory_bytes
    return usable > shape.weight_bytes


def _undominated(rated: Iterable[RatedOption]) -> list[RatedOption]:
    return _skyline(rated, lambda r: r.price, lambda r: r.rate.rps)


def _frontier(plans: Iterable[Plan]) -> list[Plan]:
    return _skyline(plans, lambda plan: plan.price_per_hour, lambda plan: plan.goodput_rps)


def _skyline(items: Iterable[T], price: Callable[[T], float], gain: Callable[[T], float]) -> list[T]:
    """Returns the items that no item as cheap or cheaper outdoes, cheapest first."""
    kept: list[T] = []
    for item in sorted(items, key=lambda item: (price(item), -gain(item))):
        # Equal up to rounding is no gain.
        if not kept or gain(item) > gain(kept[-1]) * (1 + 1e-9):
            kept.append(item)
    return kept
