"""When offloading attention pays and when not: the best offloaded decode beside the best coupled, per dollar."""

import dataclasses
from collections.abc import Sequence

from attention_offload.costs.deployments import OffloadedDeployment
from attention_offload.costs.experts import ExpertPoolDeployment
from attention_offload.costs.shapes import ModelShape
from attention_offload.devices import Device
from attention_offload.planner.goals import Goal
from attention_offload.planner.search import RatedOption, rate_decode
from attention_offload.planner.space import Space

PAYS, EVEN, DOES_NOT = "pays", "about even", "does not pay"
# Gains within this are within what the model's assumptions are good for.
_EVEN = 0.05
_POOLS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One model, workload and offer of devices.

    `gain` is requests per dollar of the best offloaded over the best coupled instance, less one. `break_even_price` is
    what the attention device of the best offloaded instance may cost per hour before the gain is gone; None where even
    a free one would not do.
    """

    coupled: RatedOption
    offloaded: RatedOption
    gain: float
    attention: Device
    break_even_price: float | None
    verdict: str


def weigh(
    goal: Goal, shapes: Sequence[ModelShape], devices: Sequence[Device], attention_devices: Sequence[Device]
) -> Case | None:
    """Compares decode on `devices` alone with attention offloaded to `attention_devices`; None where nothing fits.

    The help of prefill devices is left out, as it has no price of its own.
    """
    alone = Space(shapes=shapes, devices=devices, attention_counts=(), expert_counts=(), helpers=())
    pools = Space(
        shapes=shapes,
        devices=devices,
        attention_counts=_POOLS,
        in_flight=(2,),
        partitions=("sequence",),
        helpers=(),
        attention_devices=attention_devices,
    )
    coupled = rate_decode(goal, alone)
    offloaded = [(one, split) for one in rate_decode(goal, pools) if (split := _split(one))]
    if not coupled or not offloaded:
        return None
    rival, (best, split) = coupled[0], offloaded[0]
    gain = best.requests_per_dollar / rival.requests_per_dollar - 1
    worth = 3600 * best.rate.rps / rival.requests_per_dollar
    rest = best.price - split.attention_count * split.attention.price_per_hour
    break_even = (worth - rest) / split.attention_count
    verdict = PAYS if gain > _EVEN else EVEN if gain > -_EVEN else DOES_NOT
    return Case(
        coupled=rival,
        offloaded=best,
        gain=gain,
        attention=split.attention,
        break_even_price=break_even if break_even > 0 else None,
        verdict=verdict,
    )


def _split(rated: RatedOption) -> OffloadedDeployment | None:
    """The attention split of an option that has one."""
    deployment = rated.option.deployment
    base = deployment.base if isinstance(deployment, ExpertPoolDeployment) else deployment
    return base if isinstance(base, OffloadedDeployment) else None
