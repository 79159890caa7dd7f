"""What a simulated cluster is made of."""

import dataclasses

from serving.conductor import ConductorConfig
from serving.simulator.cache import EVICTIONS
from serving.simulator.errors import SimulatorError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """A cluster.

    Attributes:
        prefill, decode: nodes of each pool.
        cpp: prefill nodes per group; each group computes a prompt together, in chunks of `prefill_chunk` tokens
            (chunked pipeline parallelism), and is one instance to the Conductor.
        coupled: nodes that do both, instead of the two pools.
        conductor: how to schedule.
        host_blocks, ssd_blocks: KVCache of each prefill or coupled node, in blocks of the trace; 5,859 blocks of 512
            are the 3 M tokens of the paper's nodes.
        store_blocks: KVCache of a remote store that all prompts are written through to, in blocks; 0 = none. Its NICs
            are `store_nics` times those of a node.
        eviction: one of `EVICTIONS`.
        layer_wise: load, fetch and hand over KV layer by layer, hidden behind prefill.
        max_batch: sequences that one node decodes at once.
        chunk: tokens of prefill per iteration of a coupled node; 0 = prefill first, or, where the performance was
            calibrated from an engine, that engine's own scheduler (its batch and pages then rule, not `max_batch`).
        switch_s: from the last work of a node in one role to its first in the other, where the Conductor changes roles.
        failures, joins: (seconds, node) of nodes that die and start, again and again if need be; a node whose first
            entry is a join is not there before. Nodes are numbered through the prefill pool and then the decode pool,
            a group being one of them.
    """

    prefill: int = 8
    decode: int = 8
    coupled: int = 0
    conductor: ConductorConfig = dataclasses.field(default_factory=ConductorConfig)
    host_blocks: int = 5859
    ssd_blocks: int = 0
    store_blocks: int = 0
    store_nics: int = 4
    eviction: str = "lru"
    layer_wise: bool = True
    max_batch: int = 1024
    chunk: int = 0
    cpp: int = 1
    prefill_chunk: int = 8192
    switch_s: float = 10.0
    failures: tuple[tuple[float, int], ...] = ()
    joins: tuple[tuple[float, int], ...] = ()

    def __post_init__(self) -> None:
        if self.coupled and (self.prefill or self.decode):
            raise SimulatorError(
                f"{self.coupled} coupled nodes beside {self.prefill} prefill and {self.decode} decode nodes; "
                "use one kind."
            )
        if not self.coupled and (self.prefill < 1 or self.decode < 1):
            raise SimulatorError(
                f"{self.prefill} prefill and {self.decode} decode nodes cannot serve; use at least one of each."
            )
        self._check_groups()
        if self.coupled and self.conductor.roles is not None:
            raise SimulatorError("Coupled nodes have no roles to change; use prefill and decode nodes.")
        if not self.switch_s >= 0:
            raise SimulatorError(f"`switch_s` is {self.switch_s}; a change of roles takes at least 0 s.")
        if self.eviction not in EVICTIONS:
            raise SimulatorError(f"No eviction `{self.eviction}`; known: {', '.join(EVICTIONS)}.")
        if min(self.host_blocks, self.ssd_blocks, self.store_blocks, self.chunk) < 0 or self.max_batch < 1:
            raise SimulatorError("Capacities and the chunk are at least 0, and `max_batch` at least 1.")
        if self.store_blocks and (self.coupled or self.store_nics < 1):
            raise SimulatorError(
                f"A remote store of {self.store_nics} NICs beside {self.coupled} coupled nodes; use at least 1 NIC, "
                "and prefill nodes, which can fetch."
            )
        for seconds, node in (*self.failures, *self.joins):
            if not (seconds >= 0 and 0 <= node < self.instances):
                last = self.instances - 1
                raise SimulatorError(f"Node {node} at {seconds} s: there are nodes 0 to {last}, from 0 s on.")

    def _check_groups(self) -> None:
        if self.cpp < 1 or self.prefill_chunk < 1 or self.prefill % self.cpp:
            raise SimulatorError(
                f"{self.prefill} prefill nodes in groups of {self.cpp} with chunks of {self.prefill_chunk} tokens; "
                "use at least 1 of both, and a multiple of the group as nodes."
            )
        if self.cpp > 1 and (self.conductor.roles is not None or self.conductor.learn):
            raise SimulatorError("Groups (`cpp`) keep their roles, and their times are not learned; leave both out.")

    @property
    def groups(self) -> int:
        """Prefill instances."""
        return self.prefill // self.cpp

    @property
    def instances(self) -> int:
        """Of all kinds; a group is one."""
        return self.coupled or self.groups + self.decode
