"""Roles that follow load: when a prefill instance becomes a decode instance, or the reverse, and which one.

No version of the paper says how its operators do it; FAST'25, section 5.5, only shows that goodput depends on the
ratio. Loads are what section 7 of the arXiv version calls so, latencies over their limits, except that a prefill pool
below saturation has no queue to speak of: its load is the larger of its utilisation and of its queue over the limit.
"""

import dataclasses
import math

from serving.conductor.errors import ConductorError
from serving.conductor.estimators import TimeModel
from serving.conductor.placement import ClusterView
from serving.conductor.types import SLO

PREFILL, DECODE = "prefill", "decode"


@dataclasses.dataclass(frozen=True, slots=True)
class RoleConfig:
    """When to switch. The gap between `low` and `high`, `looks` and `cooldown_s` keep roles from flapping.

    Attributes:
        interval_s: how often the cluster asks.
        high: load above which a pool needs an instance.
        low: load below which the other pool must stay without the instance that it gives.
        looks: in a row that must agree.
        cooldown_s: at least, from the end of one switch to the beginning of the next.
        window_s: over which the utilisation of prefill is averaged (exponentially).
    """

    interval_s: float = 5.0
    high: float = 0.9
    low: float = 0.8
    looks: int = 3
    cooldown_s: float = 30.0
    window_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ConductorError(f"Loads of {self.low} and {self.high}: `low` must be above 0 and below `high`.")
        if not (self.interval_s > 0 and self.window_s > 0 and self.cooldown_s >= 0 and self.looks >= 1):
            raise ConductorError(
                f"Interval {self.interval_s} s, window {self.window_s} s, cooldown {self.cooldown_s} s and "
                f"{self.looks} looks: the first two must be above 0, the third at least 0, the last at least 1."
            )


@dataclasses.dataclass(frozen=True, slots=True)
class RoleChange:
    """Instance `index` of the pool `role` is to finish what it has and then join the other pool."""

    role: str
    index: int


class RoleController:
    """Watches both pools and moves one instance at a time."""

    def __init__(self, config: RoleConfig) -> None:
        self.config = config
        self._work_s = 0.0
        self._seen_s = -math.inf
        self._agreed = 0
        self._wanted: str | None = None
        self._switching = False
        self._rest_until_s = -math.inf

    def offer(self, prefill_s: float, now: float) -> None:
        """A request arrived that needs so much prefill, whether it is admitted or not."""
        self._work_s = self._work_s * self._decay(now) + prefill_s
        self._seen_s = now

    def utilisation(self, instances: int, now: float) -> float:
        """Of so many prefill instances, by the work that was offered lately."""
        return self._work_s * self._decay(now) / self.config.window_s / instances

    def decide(self, view: ClusterView, costs: TimeModel, slo: SLO, now: float) -> RoleChange | None:
        """One look at the cluster. An instance that is told to change is taken out of its pool's order."""
        wanted = None if self._switching or now < self._rest_until_s else self._needy(view, costs, slo, now)
        self._agreed = self._agreed + 1 if wanted is not None and wanted == self._wanted else int(wanted is not None)
        self._wanted = wanted
        if wanted is None or self._agreed < self.config.looks:
            return None
        self._agreed, self._switching = 0, True
        giver, order = (DECODE, view.decode_order) if wanted == PREFILL else (PREFILL, view.prefill_order)
        index = next(iter(order))[1]
        order.discard(index)
        return RoleChange(giver, index)

    def switched(self, now: float) -> None:
        """The instance has joined its new pool, or has died on the way."""
        self._switching = False
        self._rest_until_s = now + self.config.cooldown_s

    def prefill_load(self, view: ClusterView, slo: SLO, instances: int, now: float) -> float:
        """Of today's work on so many instances."""
        queues_s = sum(view.prefill[index].queue_s(now, math.inf) for _, index in view.prefill_order)
        return max(self.utilisation(instances, now), queues_s / instances / slo.ttft_s)

    def decode_load(self, view: ClusterView, costs: TimeModel, slo: SLO, instances: int) -> float:
        """Of today's requests, those in prefill included, on so many instances."""
        pool = [view.decode[index] for _, index in view.decode_order]
        batch = sum(decode.assigned for decode in pool) / instances
        return costs.decode_s(batch, sum(decode.assigned_tokens for decode in pool) / instances) / slo.tbt_s

    def _decay(self, now: float) -> float:
        return math.exp((self._seen_s - now) / self.config.window_s)

    def _needy(self, view: ClusterView, costs: TimeModel, slo: SLO, now: float) -> str | None:
        """The pool that is overloaded while the other can spare an instance."""
        prefill, decode = len(view.prefill_order), len(view.decode_order)
        high, low = self.config.high, self.config.low
        if prefill and decode > 1 and self.prefill_load(view, slo, prefill, now) > high:
            return PREFILL if self.decode_load(view, costs, slo, decode - 1) < low else None
        if decode and prefill > 1 and self.decode_load(view, costs, slo, decode) > high:
            return DECODE if self.prefill_load(view, slo, prefill - 1, now) < low else None
        return None
