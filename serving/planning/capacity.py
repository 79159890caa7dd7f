"""The cheapest cluster of like nodes that meets an SLO for a trace, found by simulating it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from serving.conductor import ConductorConfig
from serving.planning.confirm import SimulatedRun, missed, try_cluster
from serving.simulator.config import ClusterConfig
from serving.simulator.errors import SimulatorError
from serving.simulator.performance import Performance
from serving.workload.requests import Trace


@dataclasses.dataclass(frozen=True, kw_only=True)
class NodeType:
    """A kind of node: the devices of one instance, and the KVCache memory of a node that prefills.

    Attributes:
        device: name of the devices and their count, as in "h100x8".
        performance: times and price per hour of one instance, without KVCache.
        kv_bytes: bytes of KV of one token.
        dram_gb, ssd_gb: KVCache in host memory and on SSD, in 10^9 bytes.
        memory_price: dollars per hour of DRAM and SSD together.
    """

    device: str
    performance: Performance
    kv_bytes: float
    dram_gb: float
    ssd_gb: float
    memory_price: float

    def price_per_hour(self, prefill: int, decode: int) -> float:
        return (prefill + decode) * self.performance.price_per_hour + prefill * self.memory_price


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterSize:
    """Nodes of one type in both pools, how they served the trace in simulation, and whether that met the SLO."""

    node_type: NodeType
    prefill: int
    decode: int
    run: SimulatedRun
    meets: bool

    @property
    def price_per_hour(self) -> float:
        return self.node_type.price_per_hour(self.prefill, self.decode)

    @property
    def reason(self) -> str:
        return missed(self.run)


class CapacitySearch:
    """Finds how many nodes `trace` needs; `simulated` holds every size that was tried.

    The search assumes that more nodes of either pool never hurt. Per node type it doubles both pools until the SLO is
    met, bisects each pool with the other one ample, and from the fewest prefill nodes on trades decode nodes for
    prefill nodes as long as that can be cheaper than the best cluster so far.
    """

    def __init__(
        self,
        trace: Trace,
        conductor: ConductorConfig,
        *,
        attainment: float,
        max_nodes: int,
        progress: Callable[[ClusterSize], object] | None = None,
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
        self._sizes: dict[tuple[NodeType, int, int], ClusterSize] = {}

    @property
    def simulated(self) -> Sequence[ClusterSize]:
        return list(self._sizes.values())

    def cheapest(self, node_types: Sequence[NodeType]) -> ClusterSize | None:
        """Returns the cheapest cluster that meets the SLO; None where `max_nodes` nodes in either pool do not."""
        best: ClusterSize | None = None
        for node_type in sorted(node_types, key=lambda node_type: node_type.price_per_hour(1, 1)):
            best = self._cheapest_of(node_type, best)
        return best

    def why_not_cheaper(self, best: ClusterSize, node_types: Sequence[NodeType]) -> list[ClusterSize]:
        """Returns cheaper clusters that miss the SLO: a node or some memory less, the dearest of each other device."""
        for prefill, decode in ((best.prefill - 1, best.decode), (best.prefill, best.decode - 1)):
            if prefill and decode:
                self.simulate(best.node_type, prefill, decode)
        for node_type in _with_less_memory(best.node_type, node_types):
            self.simulate(node_type, best.prefill, best.decode)
        missing = self._missing_below(best)
        near = [size for size in missing if _differ_in_one(size, best)]
        dearest = {size.node_type.device: size for size in missing if size.node_type.device != best.node_type.device}
        return sorted([*near, *dearest.values()], key=lambda size: -size.price_per_hour)

    def _missing_below(self, best: ClusterSize) -> list[ClusterSize]:
        """Returns the clusters tried that cost less and miss the SLO, cheapest first."""
        below = (s for s in self._sizes.values() if s.price_per_hour < best.price_per_hour and not s.meets)
        return sorted(below, key=lambda size: size.price_per_hour)

    def _cheapest_of(self, node_type: NodeType, best: ClusterSize | None) -> ClusterSize | None:
        def cheaper(prefill: int, decode: int) -> bool:
            return best is None or node_type.price_per_hour(prefill, decode) < best.price_per_hour

        ample = 1
        while not self.simulate(node_type, ample, ample).meets:
            if ample == self._max_nodes or not cheaper(ample, ample):
                return best
            ample = min(2 * ample, self._max_nodes)
        fewest = self._fewest(lambda prefill: self.simulate(node_type, prefill, ample).meets, 1, ample)
        least = self._fewest(lambda decode: self.simulate(node_type, ample, decode).meets, 1, ample)
        decode = ample
        for prefill in range(fewest, ample + 1):
            if not cheaper(prefill, least):
                break
            decode = self._fewest(lambda d, p=prefill: self.simulate(node_type, p, d).meets, least, decode)
            if cheaper(prefill, decode):
                best = self.simulate(node_type, prefill, decode)
        return best

    @staticmethod
    def _fewest(meets: Callable[[int], bool], low: int, high: int) -> int:
        """Returns the smallest number in [low, high] that `meets`; `high` is known to."""
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(middle) else (middle + 1, high)
        return high

    def simulate(self, node_type: NodeType, prefill: int, decode: int) -> ClusterSize:
        """Serves the trace with a cluster of this size, or returns what it did the first time."""
        key = node_type, prefill, decode
        if key not in self._sizes:
            block_bytes = node_type.kv_bytes * self._trace.block_size
            cluster = ClusterConfig(
                prefill=prefill,
                decode=decode,
                conductor=self._conductor,
                host_blocks=int(node_type.dram_gb * 1e9 / block_bytes),
                ssd_blocks=int(node_type.ssd_gb * 1e9 / block_bytes),
            )
            run = try_cluster(self._trace, cluster, node_type.performance)
            self._sizes[key] = ClusterSize(
                node_type=node_type, prefill=prefill, decode=decode, run=run, meets=run.attainment >= self._attainment
            )
            if self._progress is not None:
                self._progress(self._sizes[key])
        return self._sizes[key]


def _with_less_memory(node_type: NodeType, node_types: Sequence[NodeType]) -> list[NodeType]:
    """Returns the node types with the next smaller DRAM, or SSD, on the same device."""
    alike = [other for other in node_types if other.device == node_type.device]
    less_dram = [other for other in alike if other.ssd_gb == node_type.ssd_gb and other.dram_gb < node_type.dram_gb]
    less_ssd = [other for other in alike if other.dram_gb == node_type.dram_gb and other.ssd_gb < node_type.ssd_gb]
    smaller = (max(less, key=lambda other: other.memory_price, default=None) for less in (less_dram, less_ssd))
    return [other for other in smaller if other is not None]


def _differ_in_one(size: ClusterSize, best: ClusterSize) -> bool:
    """Whether `size` has one node less, or less of one memory."""
    node, other = size.node_type, best.node_type
    if node == other:
        return abs(size.prefill - best.prefill) + abs(size.decode - best.decode) == 1
    same_nodes = (node.device, size.prefill, size.decode) == (other.device, best.prefill, best.decode)
    return same_nodes and (node.dram_gb == other.dram_gb) != (node.ssd_gb == other.ssd_gb)


def size_row(size: ClusterSize) -> Mapping[str, object]:
    """Returns a row of `result.json`."""
    run = size.run
    return {
        "device": size.node_type.device,
        "prefill": size.prefill,
        "decode": size.decode,
        "dram_gb": size.node_type.dram_gb,
        "ssd_gb": size.node_type.ssd_gb,
        "price_per_hour": size.price_per_hour,
        "meets": size.meets,
        "attainment": run.attainment,
        "ttft_p90_s": run.ttft_p90_s,
        "tbt_p90_s": run.tbt_p90_s,
        "hit_rate": run.hit_rate,
        "reason": size.reason,
    }
