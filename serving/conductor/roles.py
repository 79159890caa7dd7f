"""Roles that follow load: when a prefill instance becomes a decode instance, or the reverse, and which one.

No version of the paper says how its operators do it; FAST'25, section 5.5, only shows that goodput depends on the
ratio. Loads are what section 7 of the arXiv version calls so, latencies over their limits, except that a prefill pool
below saturation has no queue to speak of: its load is the larger of its utilisation and of its queue over the limit.
Where admission keeps latencies within their limits, a pool shows what it lacks by the requests that are refused for it.
"""

import dataclasses
import math

from serving.conductor.errors import ConductorError
from serving.conductor.estimators import TimeModel
from serving.conductor.mirror import ClusterMirror
from serving.conductor.types import SLO

PREFILL, DECODE = "prefill", "decode"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RoleConfig:
    """When to switch. The gap between `low` and `high`, `looks` and `cooldown_s` keep roles from flapping.

    Attributes:
        interval_s: how often the cluster asks.
        high: load above which a pool needs an instance.
        refused: share of requests refused or made to wait for a pool, above which it needs one too.
        low: load below which the other pool must stay without the instance that it gives.
        looks: in a row that must agree.
        cooldown_s: at least, from the end of one switch to the beginning of the next.
        window_s: over which prefill work and refusals are averaged (exponentially).
    """

    interval_s: float = 5.0
    high: float = 0.9
    low: float = 0.8
    refused: float = 0.05
    looks: int = 3
    cooldown_s: float = 30.0
    window_s: float = 60.0

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high:
            raise ConductorError(f"Loads of {self.low} and {self.high}: `low` must be above 0 and below `high`.")
        if not 0 < self.refused <= 1:
            raise ConductorError(f"`refused` is {self.refused}; it is a share of the requests above 0 and at most 1.")
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
        self._work_s = self._arrived = 0.0
        self._refused = {PREFILL: 0.0, DECODE: 0.0}
        self._seen_s = -math.inf
        self._agreed = 0
        self._wanted: str | None = None
        self._switching = False
        self._rest_until_s = -math.inf

    def arrived(self, now: float, refused_for: str | None = None) -> None:
        """A request arrived; it was admitted, or refused or made to wait for want of that pool."""
        self._age(now)
        self._arrived += 1
        if refused_for is not None:
            self._refused[refused_for] += 1

    def work(self, prefill_s: float, now: float) -> None:
        """So much prefill was admitted, or was refused for want of prefill alone."""
        self._age(now)
        self._work_s += prefill_s

    def utilisation(self, instances: int, now: float) -> float:
        """Of so many prefill instances, by the work of late."""
        self._age(now)
        return self._work_s / self.config.window_s / instances

    def lacks(self, pool: str) -> bool:
        """Whether too many requests of late were refused for want of this pool."""
        return self._refused[pool] > self.config.refused * self._arrived

    def decide(self, mirror: ClusterMirror, costs: TimeModel, slo: SLO, now: float) -> RoleChange | None:
        """One look at the cluster. An instance that is told to change is taken out of its pool's order."""
        wanted = None if self._switching or now < self._rest_until_s else self._needy(mirror, costs, slo, now)
        self._agreed = self._agreed + 1 if wanted is not None and wanted == self._wanted else int(wanted is not None)
        self._wanted = wanted
        if wanted is None or self._agreed < self.config.looks:
            return None
        self._agreed, self._switching = 0, True
        giver, order = (DECODE, mirror.decode_order) if wanted == PREFILL else (PREFILL, mirror.prefill_order)
        index = next(iter(order))[1]
        order.discard(index)
        return RoleChange(giver, index)

    def switched(self, now: float) -> None:
        """The instance has joined its new pool, or has died on the way."""
        self._switching = False
        self._rest_until_s = now + self.config.cooldown_s

    def prefill_load(self, mirror: ClusterMirror, slo: SLO, instances: int, now: float) -> float:
        """Of today's work on so many instances."""
        queues_s = sum(mirror.prefill[index].queue_s(now, math.inf) for _, index in mirror.prefill_order)
        return max(self.utilisation(instances, now), queues_s / instances / slo.ttft_s)

    def decode_load(self, mirror: ClusterMirror, costs: TimeModel, slo: SLO, instances: int) -> float:
        """Of today's requests, those in prefill included, on so many instances."""
        pool = [mirror.decode[index] for _, index in mirror.decode_order]
        batch = sum(decode.assigned for decode in pool) / instances
        return costs.decode_s(batch, sum(decode.assigned_tokens for decode in pool) / instances) / slo.tbt_s

    def _age(self, now: float) -> None:
        keep = math.exp((self._seen_s - now) / self.config.window_s)
        self._seen_s = now
        self._work_s *= keep
        self._arrived *= keep
        for pool in self._refused:
            self._refused[pool] *= keep

    def _needy(self, mirror: ClusterMirror, costs: TimeModel, slo: SLO, now: float) -> str | None:
        """The pool that is overloaded while the other can spare an instance."""
        prefill, decode = len(mirror.prefill_order), len(mirror.decode_order)
        if not (prefill and decode):
            return None

        def overloaded(pool: str, load: float) -> bool:
            return load > self.config.high or self.lacks(pool)

        def can_spare(pool: str, load: float) -> bool:
            return load < self.config.low and not self.lacks(pool)

        if overloaded(PREFILL, self.prefill_load(mirror, slo, prefill, now)):
            spared = decode > 1 and can_spare(DECODE, self.decode_load(mirror, costs, slo, decode - 1))
            return PREFILL if spared else None
        if overloaded(DECODE, self.decode_load(mirror, costs, slo, decode)):
            spared = prefill > 1 and can_spare(PREFILL, self.prefill_load(mirror, slo, prefill - 1, now))
            return DECODE if spared else None
        return None
