"""The cheapest cluster of like nodes that meets an SLO for a trace, found by simulating it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from serving.conductor import ConductorConfig
from serving.planning.confirm import Trial, missed, try_cluster
from serving.simulator.config import ClusterConfig
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import Performance
from serving.workload.requests import Trace


@dataclasses.dataclass(frozen=True)
class Kit:
    """What nodes are made of: a kind of instance, and the KVCache memory of each one that prefills.

    Attributes:
        device: how the instance is called.
        performance: its times and its price per hour, without KVCache.
        kv_bytes: of one token.
        dram_gb, ssd_gb: KVCache in host memory and on SSD, in 10^9 bytes.
        memory_price: dollars per hour of both.
    """

    device: str
    performance: Performance
    kv_bytes: float
    dram_gb: float
    ssd_gb: float
    memory_price: float

    def price_per_hour(self, prefill: int, decode: int) -> float:
        return (prefill + decode) * self.performance.price_per_hour + prefill * self.memory_price


@dataclasses.dataclass(frozen=True)
class Sizing:
    """A cluster that was simulated, and whether it met the SLO."""

    kit: Kit
    prefill: int
    decode: int
    trial: Trial
    meets: bool

    @property
    def price_per_hour(self) -> float:
        return self.kit.price_per_hour(self.prefill, self.decode)

    @property
    def reason(self) -> str:
        return missed(self.trial)


class CapacitySearch:
    """Sizes clusters for `trace`; `simulated` holds every one that was tried.

    More nodes of either pool are taken never to hurt. Per kit, both pools are doubled until the SLO is met, each is
    then bisected with the other one ample, and from the fewest prefill nodes on, decode nodes are traded for prefill
    nodes as long as that can be cheaper than the best cluster so far.
    """

    def __init__(
        self,
        trace: Trace,
        conductor: ConductorConfig,
        attainment: float,
        max_nodes: int,
        progress: Callable[[Sizing], object] | None = None,
    ) -> None:
        """`attainment` is the share of all requests that is to be within both limits of the Conductor's SLO.

        Raises `SimulatorError` for a share or a number of nodes that cannot be.
        """
        if not 0 < attainment <= 1:
            raise SimulatorError(f"`attainment` is a share of the requests above 0 and at most 1, got {attainment}.")
        if max_nodes < 1:
            raise SimulatorError(f"`max_nodes` of a pool must be at least 1, got {max_nodes}.")
        self._trace, self._conductor, self._attainment = trace, conductor, attainment
        self._max_nodes, self._progress = max_nodes, progress
        self._sizings: dict[tuple[Kit, int, int], Sizing] = {}

    @property
    def simulated(self) -> Sequence[Sizing]:
        return list(self._sizings.values())

    def cheapest(self, kits: Sequence[Kit]) -> Sizing | None:
        """The cheapest cluster that meets the SLO; None where none does with `max_nodes` nodes in either pool."""
        best: Sizing | None = None
        for kit in sorted(kits, key=lambda kit: kit.price_per_hour(1, 1)):
            best = self._cheapest_of(kit, best)
        return best

    def why_not_cheaper(self, best: Sizing, kits: Sequence[Kit]) -> list[Sizing]:
        """Clusters below the price of `best` that miss: a node or some memory less, the dearest of other devices."""
        for prefill, decode in ((best.prefill - 1, best.decode), (best.prefill, best.decode - 1)):
            if prefill and decode:
                self._size(best.kit, prefill, decode)
        for kit in _with_less_memory(best.kit, kits):
            self._size(kit, best.prefill, best.decode)
        near = [sizing for sizing in self._missing_below(best) if _differ_in_one(sizing, best)]
        dearest = {s.kit.device: s for s in self._missing_below(best) if s.kit.device != best.kit.device}
        return sorted([*near, *dearest.values()], key=lambda sizing: -sizing.price_per_hour)

    def _missing_below(self, best: Sizing) -> list[Sizing]:
        """Clusters that cost less and miss, cheapest first."""
        below = (s for s in self._sizings.values() if s.price_per_hour < best.price_per_hour and not s.meets)
        return sorted(below, key=lambda sizing: sizing.price_per_hour)

    def _cheapest_of(self, kit: Kit, best: Sizing | None) -> Sizing | None:
        def cheaper(prefill: int, decode: int) -> bool:
            return best is None or kit.price_per_hour(prefill, decode) < best.price_per_hour

        ample = 1
        while not self._size(kit, ample, ample).meets:
            if ample == self._max_nodes or not cheaper(ample, ample):
                return best
            ample = min(2 * ample, self._max_nodes)
        fewest = self._fewest(lambda prefill: self._size(kit, prefill, ample).meets, 1, ample)
        least = self._fewest(lambda decode: self._size(kit, ample, decode).meets, 1, ample)
        decode = ample
        for prefill in range(fewest, ample + 1):
            if not cheaper(prefill, least):
                break
            decode = self._fewest(lambda d, p=prefill: self._size(kit, p, d).meets, least, decode)
            if cheaper(prefill, decode):
                best = self._size(kit, prefill, decode)
        return best

    @staticmethod
    def _fewest(meets: Callable[[int], bool], low: int, high: int) -> int:
        """The smallest number in [low, high] that `meets`; `high` is known to."""
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(middle) else (middle + 1, high)
        return high

    def _size(self, kit: Kit, prefill: int, decode: int) -> Sizing:
        key = kit, prefill, decode
        if key not in self._sizings:
            block_bytes = kit.kv_bytes * self._trace.block_size
            cluster = ClusterConfig(
                prefill,
                decode,
                conductor=self._conductor,
                host_blocks=int(kit.dram_gb * 1e9 / block_bytes),
                ssd_blocks=int(kit.ssd_gb * 1e9 / block_bytes),
            )
            trial = try_cluster(self._trace, cluster, kit.performance)
            self._sizings[key] = Sizing(kit, prefill, decode, trial, trial.attainment >= self._attainment)
            if self._progress is not None:
                self._progress(self._sizings[key])
        return self._sizings[key]


def _with_less_memory(kit: Kit, kits: Sequence[Kit]) -> list[Kit]:
    """The next smaller of either memory, on the same device."""
    alike = [other for other in kits if other.device == kit.device]
    less_dram = [other for other in alike if other.ssd_gb == kit.ssd_gb and other.dram_gb < kit.dram_gb]
    less_ssd = [other for other in alike if other.dram_gb == kit.dram_gb and other.ssd_gb < kit.ssd_gb]
    smaller = (max(less, key=lambda other: other.memory_price, default=None) for less in (less_dram, less_ssd))
    return [other for other in smaller if other is not None]


def _differ_in_one(sizing: Sizing, best: Sizing) -> bool:
    """One node less, or less of one memory."""
    if sizing.kit == best.kit:
        return abs(sizing.prefill - best.prefill) + abs(sizing.decode - best.decode) == 1
    same_nodes = (sizing.kit.device, sizing.prefill, sizing.decode) == (best.kit.device, best.prefill, best.decode)
    return same_nodes and (sizing.kit.dram_gb == best.kit.dram_gb) != (sizing.kit.ssd_gb == best.kit.ssd_gb)


def sizing_row(sizing: Sizing) -> Mapping[str, object]:
    """One row of a result."""
    trial = sizing.trial
    return {
        "device": sizing.kit.device,
        "prefill": sizing.prefill,
        "decode": sizing.decode,
        "dram_gb": sizing.kit.dram_gb,
        "ssd_gb": sizing.kit.ssd_gb,
        "price_per_hour": sizing.price_per_hour,
        "meets": sizing.meets,
        "attainment": trial.attainment,
        "ttft_p90_s": trial.ttft_p90_s,
        "tbt_p90_s": trial.tbt_p90_s,
        "hit_rate": trial.hit_rate,
        "reason": sizing.reason,
    }
