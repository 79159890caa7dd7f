"""`Goal`: what a deployment is for."""

import dataclasses

from attention_offload.costs.knobs import A_PRIORI, Knobs
from attention_offload.costs.workloads import DecodeWorkload
from attention_offload.errors import OffloadError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Goal:
    """Serve `workload` within `ttft_slo_s` and `tbt_slo_s` seconds for at most `budget_per_hour` dollars.

    `attainment` is the share of the requests that is to keep each target while arrivals come and go at random: rooms
    and queues are sized for that quantile, not for the mean. `dispersion` is how random: variance over mean of the
    arrivals within the time of one answer, 1 for a Poisson process, more for bursts. `hit_rate` is the share of prompt
    tokens found in a prefix cache; `demand_rps` caps the useful rate, in requests per second.
    """

    workload: DecodeWorkload
    budget_per_hour: float
    ttft_slo_s: float
    tbt_slo_s: float
    attainment: float = 0.9
    hit_rate: float = 0.0
    demand_rps: float = float("inf")
    dispersion: float = 1.0
    knobs: Knobs = A_PRIORI

    def __post_init__(self) -> None:
        for field in ("budget_per_hour", "ttft_slo_s", "tbt_slo_s", "demand_rps"):
            if not getattr(self, field) > 0:
                raise OffloadError(f"`{field}` must be positive, got {getattr(self, field)}.")
        if not 0.5 <= self.attainment < 1:
            raise OffloadError(f"`attainment` is a share of the requests from 0.5 to below 1, got {self.attainment}.")
        if not self.dispersion >= 0:
            raise OffloadError(f"`dispersion` is a variance over a mean and cannot be negative, got {self.dispersion}.")
        if not 0 <= self.hit_rate < 1:
            raise OffloadError(f"`hit_rate` is a share of the prompt tokens below 1, got {self.hit_rate}.")
