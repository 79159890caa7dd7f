"""Nodes that change their roles: one at a time, once nothing is left on it."""

from collections.abc import Callable, Mapping

from serving.conductor import Conductor
from serving.conductor.roles import DECODE, PREFILL
from serving.simulator.batch import Timer
from serving.simulator.cluster import Cluster
from serving.simulator.request_state import RequestState


class RoleChanges:
    """The node that the Conductor wants in the other pool, from that wish until it serves there.

    Attributes:
        count: changes that were made.
    """

    def __init__(
        self,
        cluster: Cluster,
        conductor: Conductor,
        states: Mapping[str, RequestState],
        at: Timer,
        served: Callable[[float], None],
    ) -> None:
        """`states` are all requests on their way; `served` is called when a node has joined its new pool."""
        self.count = 0
        self._cluster, self._conductor, self._states = cluster, conductor, states
        self._at, self._served = at, served
        self._node: int | None = None
        # From when on it will serve again; 0 as long as it is not empty.
        self._ready_s = 0.0

    def ask(self, now: float) -> None:
        """Lets the Conductor name a node."""
        change = self._conductor.rebalance(now)
        if change is not None:
            node = change.index if change.role == PREFILL else self._cluster.decode_node(change.index)
            self._node = node
        self.drain(now)

    def drain(self, now: float) -> None:
        """Changes the node's role if nothing is left on it; its KVCache does not go with it."""
        node, cluster = self._node, self._cluster
        if node is None or self._ready_s or not self._idle(node, now):
            return
        if cluster.roles[node] == PREFILL:
            cluster.forget_cache(node)
        cluster.roles[node] = PREFILL if cluster.roles[node] == DECODE else DECODE
        self._ready_s = now + cluster.config.switch_s
        self._at(self._ready_s, self._changed, node)

    def died(self, node: int, now: float) -> None:
        """A node has died; if it was this one, that ends its change."""
        if node == self._node:
            self._node, self._ready_s = None, 0.0
            self._conductor.rebalanced(now)

    def _idle(self, node: int, now: float) -> bool:
        cluster = self._cluster
        if cluster.roles[node] == DECODE:
            return not cluster.decode[cluster.decode_index(node)].assigned
        # Its KV may still be on its way, to decode nodes or to others that reuse it.
        return not any(
            (state.placement.prefill == node and (not state.first_token_s or state.arrives_s))
            or state.fetches_from(node, now)
            for state in self._states.values()
        )

    def _changed(self, node: int, now: float) -> None:
        if node != self._node or now != self._ready_s:
            # It died meanwhile.
            return
        self._node, self._ready_s = None, 0.0
        self.count += 1
        self._conductor.rebalanced(now)
        self._cluster.serve(node, now)
        self._served(now)
