"""The simulated cluster: its nodes, who of them serves, and the view of it all that the Conductor schedules by."""

import math
from collections.abc import Callable

from kvcache.prefix_index import PrefixIndex
from serving.conductor import ClusterView
from serving.conductor.pipeline import PipelineTimeModel
from serving.conductor.roles import DECODE, PREFILL
from serving.request import TraceRequest
from serving.simulator.batch import Timer
from serving.simulator.cache import NodeCache
from serving.simulator.config import ClusterConfig
from serving.simulator.engine_node import EngineNode
from serving.simulator.nodes import CoupledNode, DecodeNode, Nic, PrefillNode, transfer
from serving.simulator.performance import Performance
from serving.simulator.prefill_group import PrefillGroup
from serving.simulator.request_state import RequestState
from serving.simulator.store import RemoteStore
from serving.workload.prompts import BYTE_IDS, PromptWriter

_Ended = Callable[[RequestState, float], None]


class Cluster:
    """Nodes and what they hold. A node has the index of its prefill side; `decode_index` is that of its decode side.

    Attributes:
        prefill, decode: the sides of all nodes. Coupled nodes are in both; where roles follow load, every node has one
            of either kind.
        caches: by node. nics: by node, and that of the store.
        roles: by node; of coupled ones there are none.
        engines: whether coupled nodes run the engine's own scheduler.
        costs: what a prefill costs an instance, be it a node or a group.
        tiers: where KV can be reused from.
    """

    def __init__(
        self, config: ClusterConfig, performance: Performance, at: Timer, prefilled: _Ended, decoded: _Ended
    ) -> None:
        """`prefilled` and `decoded` are told of every request, and when, that ended either phase."""
        self.config, self._performance = config, performance
        self.engines = bool(config.coupled and performance.engine and not config.chunk)
        self.tiers = ("device",) if self.engines else ("host", "ssd", "remote", "store")
        self.costs = performance.group(config.cpp, config.prefill_chunk) if config.cpp > 1 else performance.costs
        self.roles = [PREFILL] * config.groups + [DECODE] * config.decode
        self.nics = [self._nic(node) for node in range(config.instances)]
        self.caches = [
            NodeCache(config.host_blocks * nic.count, config.ssd_blocks * nic.count, config.eviction)
            for nic in self.nics
        ]
        # [node, from, until] of nodes; those that are up have no end yet.
        self._lives: list[tuple[int, float, float]] = []
        self._up: dict[int, float] = {}
        self.prefill: list[PrefillNode | CoupledNode | EngineNode] = []
        self.decode: list[DecodeNode | EngineNode] = []
        if config.coupled:
            nodes = [self._coupled(index, at, prefilled, decoded) for index in range(config.coupled)]
            self.prefill.extend(nodes)
            self.decode.extend(nodes)
        else:
            self._add_sides(at, prefilled, decoded)
        self.store: RemoteStore | None = None
        if config.store_blocks:
            cache, nic = NodeCache(config.store_blocks, 0, config.eviction), Nic(config.store_nics)
            self.store = RemoteStore(len(self.nics), cache, nic, performance)
            self.nics.append(nic)
        self.view = ClusterView([*self.prefill], [*self.decode], 512, coupled=bool(config.coupled))
        if config.ssd_blocks and not self.engines:
            self.view.directory, self.view.slow_token = PrefixIndex(2), performance.ssd_token / config.cpp
        for node in range(config.instances):
            joins = [seconds for seconds, other in config.joins if other == node]
            failures = [seconds for seconds, other in config.failures if other == node]
            if not joins or min(failures, default=math.inf) < min(joins):
                self.join(node, 0.0)

    def _nic(self, node: int) -> Nic:
        """Of a node or a group of them."""
        return Nic(self.config.cpp if node < self.config.groups else 1)

    def _add_sides(self, at: Timer, prefilled: _Ended, decoded: _Ended) -> None:
        config, performance, costs = self.config, self._performance, self.costs
        follow_load = config.conductor.roles is not None
        for i, cache in enumerate(self.caches if follow_load else self.caches[: config.groups]):
            given = performance, self.nics, cache, at, prefilled, config.layer_wise
            if isinstance(costs, PipelineTimeModel):
                self.prefill.append(PrefillGroup(f"p{i}", i, *given, costs))
            else:
                self.prefill.append(PrefillNode(f"p{i}", i, *given))
        for i in range(config.instances if follow_load else config.decode):
            self.decode.append(DecodeNode(f"d{i}", i, performance, config.max_batch, at, decoded))

    def _coupled(self, index: int, at: Timer, prefilled: _Ended, decoded: _Ended) -> CoupledNode | EngineNode:
        config, performance, cache = self.config, self._performance, self.caches[index]
        name = f"c{index}"
        if not self.engines:
            return CoupledNode(name, index, performance, config.max_batch, at, decoded, cache, prefilled, config.chunk)

        def prompt(request: TraceRequest) -> list[int]:
            return PromptWriter(BYTE_IDS, self.view.block_size).prompt(request)

        return EngineNode(name, index, performance, at, decoded, cache, prefilled, prompt, config.conductor.seed)

    def fits(self, request: TraceRequest) -> bool:
        """Whether a node can serve a request of this length at all."""
        engine = self._performance.engine if self.engines else None
        return engine is None or engine.fits(request.input_tokens, request.output_tokens)

    def prefills(self, node: int) -> bool:
        return bool(self.config.coupled) or self.roles[node] == PREFILL

    def decodes(self, node: int) -> bool:
        return bool(self.config.coupled) or self.roles[node] == DECODE

    def decode_index(self, node: int) -> int:
        """Of a node's decode side: the decode pool first, then nodes that began in the other one."""
        prefill, decode = self.config.groups, self.config.decode
        return node if self.config.coupled else node - prefill if node >= prefill else decode + node

    def decode_node(self, index: int) -> int:
        """The node of a decode side."""
        prefill, decode = self.config.groups, self.config.decode
        return prefill + index if index < decode else index - decode

    def serve(self, node: int, now: float) -> None:
        """Gives a node its place in the pool of its role."""
        if self.prefills(node):
            self.view.prefill_order.set(node, now)
        if self.decodes(node):
            index = self.decode_index(node)
            self.view.decode_order.set(index, self.decode[index].times.decode_s(0, 0))

    def join(self, node: int, now: float) -> bool:
        """A node starts to serve, with an empty cache; `False` where it is up already."""
        if node in self._up:
            return False
        self._up[node] = now
        self.serve(node, now)
        return True

    def leave(self, node: int, now: float) -> bool:
        """A node dies with its KV; `False` where it was not up."""
        if node not in self._up:
            return False
        self._lives.append((node, self._up.pop(node), now))
        self.nics[node] = self._nic(node)
        if self.prefills(node):
            self.view.prefill_order.discard(node)
            self.forget_cache(node)
        if self.decodes(node):
            self.view.decode_order.discard(self.decode_index(node))
        return True

    def node_s(self, begin_s: float, end_s: float) -> float:
        """Seconds of all nodes that were up in between."""
        lives = [*self._lives, *((node, since, end_s) for node, since in self._up.items())]
        return sum(
            self.nics[node].count * max(0.0, min(until, end_s) - max(since, begin_s)) for node, since, until in lives
        )

    def rank(self, node: PrefillNode | CoupledNode | EngineNode) -> None:
        """Orders a prefill instance anew after its load has changed."""
        if node.index in self.view.prefill_order:
            load = node.free_at_s if isinstance(node, PrefillNode) else float(node.assigned)
            self.view.prefill_order.set(node.index, load)

    def reserve(self, state: RequestState) -> None:
        """Counts a request to the load of its decode instance."""
        decode = self.decode[state.placement.decode]
        self.view.decode_order.set(decode.index, decode.assign(state, 1))

    def release(self, state: RequestState) -> None:
        decode = self.decode[state.placement.decode]
        load = decode.assign(state, -1)
        if decode.index in self.view.decode_order:
            self.view.decode_order.set(decode.index, load)
        if self.view.coupled:
            self.rank(self.prefill[decode.index])

    def insert_blocks(self, node: int, request: TraceRequest, now: float) -> None:
        """Puts a prompt's blocks into a node's cache, and tells the directory what that moved."""
        if not (request.keys and self.config.host_blocks):
            return
        directory = self.view.directory
        directory.add(node, request.keys)
        demoted, lost = self.caches[node].touch(request.keys, now)
        if self.config.ssd_blocks:
            directory.remove(node, request.keys, tier=1)
            directory.add(node, demoted, tier=1)
            directory.remove(node, demoted, tier=0)
        if lost:
            directory.remove(node, lost)

    def forget_cache(self, node: int) -> None:
        """Empties a node's cache."""
        self.view.directory.remove(node, self.caches[node].clear())

    def ssd_tokens(self, state: RequestState) -> int:
        """Tokens among those that a request reuses on its own node that must come from SSD."""
        placement, size = state.placement, self.view.block_size
        local = placement.reused_tokens - placement.fetched_tokens
        if not self.config.ssd_blocks or self.engines or local <= 0:
            return 0
        blocks = state.request.keys[: -(-local // size)]
        return min(local, self.caches[placement.prefill].on_ssd(blocks) * size)

    def fetch(self, state: RequestState, source: int, now: float) -> float:
        """Has another holder send a prefix; returns when it is there.

        What the holder keeps on SSD it must read first, layer by layer as it sends.
        """
        placement, size = state.placement, self.view.block_size
        seconds = self._performance.costs.transfer_s(placement.fetched_tokens)
        fetched_s = transfer(self.nics[source], self.nics[placement.prefill], seconds, now)
        if self.config.ssd_blocks and source < len(self.caches):
            local = placement.reused_tokens - placement.fetched_tokens
            fetched = state.request.keys[local // size : -(-placement.reused_tokens // size)]
            read_s = self._performance.ssd_token * self.caches[source].on_ssd(fetched) * size
            fetched_s = max(fetched_s, now + read_s / self.nics[source].count)
        return fetched_s

    def hand_over(self, state: RequestState, since_s: float, now: float) -> float:
        """Sends all KV of a prompt to its decode node; returns when it is there.

        Layer by layer it leaves from `since_s` on, the last layer after prefill, which ends `now`.
        """
        seconds = self._performance.costs.transfer_s(state.request.input_tokens)
        sender, receiver = self.nics[state.placement.prefill], self.nics[self.decode_node(state.placement.decode)]
        if not self.config.layer_wise:
            return transfer(sender, receiver, seconds, now)
        last_layer_s = seconds / self._performance.layers
        return max(now + last_layer_s, transfer(sender, receiver, seconds, since_s))
