"""What the simulated instances of one cluster share."""

import dataclasses

from serving.cluster.instance import Events
from serving.conductor.links import Links
from serving.simulator.cache import NodeCache
from serving.simulator.clock import Timer
from serving.simulator.config import ClusterConfig
from serving.simulator.performance import Performance
from serving.simulator.simulated_request import SimulatedRequest
from serving.simulator.store import RemoteStore


@dataclasses.dataclass(slots=True, kw_only=True)
class World:
    """Hardware, clock, and the requests that are on their way.

    Attributes:
        at: the clock.
        events: who hears what instances report.
        links: the NICs of all instances, and that of the store.
        caches: KVCaches of all instances.
        requests: the latest attempt of every request that has not ended, by id.
        store: the remote store, if there is one.
        block_size: tokens per block.
    """

    config: ClusterConfig
    performance: Performance
    at: Timer
    events: Events
    links: Links
    caches: list[NodeCache]
    requests: dict[str, SimulatedRequest] = dataclasses.field(default_factory=dict)
    store: RemoteStore | None = None
    block_size: int = 512

    def fetch(self, state: SimulatedRequest, source: int, now: float) -> float:
        """Has another holder send a prefix; returns when it is there.

        What the holder keeps on SSD it must read first, layer by layer as it sends.
        """
        placement, size = state.placement, self.block_size
        seconds = self.performance.costs.transfer_s(placement.fetched_tokens)
        fetched_s = self.links.book(source, placement.prefill, seconds, now)
        if self.config.ssd_blocks and source < len(self.caches):
            local = placement.reused_tokens - placement.fetched_tokens
            fetched = state.request.keys[local // size : -(-placement.reused_tokens // size)]
            read_s = self.performance.ssd_token * self.caches[source].on_ssd(fetched) * size
            fetched_s = max(fetched_s, now + read_s / self.links.counts[source])
        return fetched_s

    def hand_over(self, state: SimulatedRequest, receiver: int, since_s: float, now: float) -> float:
        """Sends all KV of a prompt to instance `receiver`; returns when it is there.

        Layer by layer it leaves from `since_s` on, the last layer after prefill, which ends `now`.
        """
        seconds, sender = self.performance.costs.transfer_s(state.request.input_tokens), state.placement.prefill
        if not self.config.layer_wise:
            return self.links.book(sender, receiver, seconds, now)
        last_layer_s = seconds / self.performance.layers
        return max(now + last_layer_s, self.links.book(sender, receiver, seconds, since_s))
