"""The simulated cluster: the instances that a configuration asks for, and the mirror that the Conductor begins with."""

import dataclasses
import functools
import math

from kvcache.prefix_index import PrefixIndex
from serving.cluster.coordinator import Coordinator
from serving.conductor import ClusterMirror
from serving.conductor.links import Links
from serving.conductor.mirror import DecodeMirror, PrefillMirror
from serving.conductor.pipeline import PipelineTimeModel
from serving.conductor.roles import DECODE, PREFILL
from serving.request import TraceRequest
from serving.simulator.cache import NodeCache
from serving.simulator.clock import Timer
from serving.simulator.config import ClusterConfig
from serving.simulator.coupled_node import CoupledNode
from serving.simulator.decode_node import DecodeNode
from serving.simulator.engine_node import EngineNode
from serving.simulator.instance import SimulatedInstance
from serving.simulator.performance import Performance
from serving.simulator.prefill_group import PrefillGroup
from serving.simulator.prefill_node import PrefillNode
from serving.simulator.store import RemoteStore
from serving.simulator.world import World
from serving.workload.prompts import BYTE_IDS, PromptWriter


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Which instance is which: a number for each, and indices in the pools.

    Numbers run through the prefill pool and then the decode pool, and are prefill indices. Decode indices run through
    the decode pool first, and then, where roles follow load, through instances that began in the other one.
    """

    config: ClusterConfig

    @property
    def follows_load(self) -> bool:
        return self.config.conductor.roles is not None

    @property
    def counts(self) -> list[int]:
        """Nodes of each instance."""
        return [self.config.cpp if n < self.config.groups else 1 for n in range(self.config.instances)]

    @property
    def decode_numbers(self) -> list[int]:
        """Instance numbers by decode index."""
        config = self.config
        if config.coupled:
            return [*range(config.coupled)]
        born = [*range(config.groups, config.instances)]
        return [*born, *range(config.groups)] if self.follows_load else born

    @property
    def prefill_numbers(self) -> list[int]:
        """Instance numbers by prefill index."""
        config = self.config
        return [*range(config.instances if config.coupled or self.follows_load else config.groups)]


def runs_engines(config: ClusterConfig, performance: Performance) -> bool:
    """Whether coupled nodes run the engine's own scheduler."""
    return bool(config.coupled and performance.engine and not config.chunk)


def prefill_costs(config: ClusterConfig, performance: Performance) -> PipelineTimeModel | None:
    """What a prefill costs a group of nodes; `None` where nodes compute prompts alone."""
    return performance.group(config.cpp, config.prefill_chunk) if config.cpp > 1 else None


def cluster_mirror(config: ClusterConfig, performance: Performance) -> ClusterMirror:
    """The cluster before anything happened; no instance serves yet."""
    layout, engines = Layout(config=config), runs_engines(config, performance)
    kind = "c" if config.coupled else "p"
    # An engine queues whatever it cannot hold yet.
    capacity = 1 << 60 if engines else performance.kv_capacity_tokens
    store = config.instances if config.store_blocks else None
    slow = bool(config.ssd_blocks) and not engines
    return ClusterMirror(
        prefill=[
            PrefillMirror(name=f"{kind}{n}", index=n, keeps_running=bool(config.coupled), in_order=not engines)
            for n in layout.prefill_numbers
        ],
        decode=[
            DecodeMirror(
                name=f"{'c' if config.coupled else 'd'}{index}", index=index, link=n, kv_capacity_tokens=capacity
            )
            for index, n in enumerate(layout.decode_numbers)
        ],
        block_size=512,
        links=Links([*layout.counts, *([config.store_nics] if config.store_blocks else [])]),
        decode_s=performance.decode_times.decode_s,
        link_token_s=performance.costs.transfer_token,
        coupled=bool(config.coupled),
        keeps_blocks=bool(config.host_blocks),
        layer_wise=config.layer_wise,
        slow_token=performance.ssd_token / config.cpp if slow else 0.0,
        store=store,
        directory=PrefixIndex(2 if slow else 1),
    )


class Cluster:
    """Instances and what they hold.

    Attributes:
        world: what the instances share.
        instances: by number.
    """

    def __init__(self, config: ClusterConfig, performance: Performance, at: Timer, coordinator: Coordinator) -> None:
        """Registers the instances with `coordinator`; those that are there at the start join at once."""
        self.config = config
        self._layout = Layout(config=config)
        self._coordinator = coordinator
        self._engine = performance.engine if runs_engines(config, performance) else None
        counts = self._layout.counts
        self.world = World(
            config=config,
            performance=performance,
            at=at,
            events=coordinator,
            links=Links([*counts, *([config.store_nics] if config.store_blocks else [])]),
            caches=[
                NodeCache(config.host_blocks * count, config.ssd_blocks * count, config.eviction) for count in counts
            ],
        )
        if config.store_blocks:
            self.world.store = RemoteStore(
                index=config.instances,
                cache=NodeCache(config.store_blocks, 0, config.eviction),
                links=self.world.links,
                token_s=performance.costs.transfer_token,
                events=coordinator,
            )
        # [number, from, until] of instances; those that are up have no end yet.
        self._lives: list[tuple[int, float, float]] = []
        self._up: dict[int, float] = {}
        self.instances = [self._instance(number) for number in range(config.instances)]
        for number in range(config.instances):
            joins = [seconds for seconds, other in config.joins if other == number]
            failures = [seconds for seconds, other in config.failures if other == number]
            if not joins or min(failures, default=math.inf) < min(joins):
                self.join(number, 0.0)

    def _instance(self, number: int) -> SimulatedInstance:
        config, numbers = self.config, self._layout.decode_numbers
        kind = "c" if config.coupled else "p" if number < config.groups else "d"
        born = number if config.coupled or number < config.groups else number - config.groups
        instance = SimulatedInstance(f"{kind}{born}", number, self.world)
        if config.coupled:
            node = self._coupled(instance)
            instance.equip(node, node, numbers)
        else:
            prefill = self._prefill(instance) if number in self._layout.prefill_numbers else None
            decode = self._decode(numbers.index(number)) if number in numbers else None
            instance.equip(prefill, decode, numbers)
        self._coordinator.add(instance, PREFILL if config.coupled or number < config.groups else DECODE)
        return instance

    def _prefill(self, instance: SimulatedInstance) -> PrefillNode:
        config, world = self.config, self.world
        costs = prefill_costs(config, world.performance)
        kind = PrefillNode if costs is None else functools.partial(PrefillGroup, costs=costs)
        return kind(
            index=instance.number,
            performance=world.performance,
            at=world.at,
            events=world.events,
            prefilled=instance.prefilled,
            layer_wise=config.layer_wise,
        )

    def _decode(self, index: int) -> DecodeNode:
        performance, world = self.world.performance, self.world
        return DecodeNode(
            index=index,
            times=performance.decode_times,
            capacity_tokens=performance.kv_capacity_tokens,
            max_batch=self.config.max_batch,
            at=world.at,
            events=world.events,
            reports_iterations=self.config.conductor.learn,
        )

    def _coupled(self, instance: SimulatedInstance) -> CoupledNode | EngineNode:
        config, world = self.config, self.world
        if self._engine is None:
            return CoupledNode(
                index=instance.number,
                performance=world.performance,
                max_batch=config.max_batch,
                at=world.at,
                events=world.events,
                prefilled=instance.prefilled,
                chunk=config.chunk,
            )

        def prompt(request: TraceRequest) -> list[int]:
            return PromptWriter(BYTE_IDS, world.block_size).prompt(request)

        return EngineNode(
            name=instance.name,
            index=instance.number,
            model=self._engine,
            costs=world.performance.costs,
            at=world.at,
            events=world.events,
            prefilled=instance.prefilled,
            prompt=prompt,
            seed=config.conductor.seed,
        )

    def fits(self, request: TraceRequest) -> bool:
        """Whether an instance can serve a request of this length at all."""
        return self._engine is None or self._engine.fits(request.input_tokens, request.output_tokens)

    def join(self, number: int, now: float) -> None:
        """An instance starts to serve, with an empty cache, unless it is up already."""
        if number not in self._up:
            self._up[number] = now
            self._coordinator.joined(self.instances[number].name, now)

    def fail(self, number: int, now: float) -> None:
        """An instance dies with its KV, if it is up."""
        if number in self._up:
            self._lives.append((number, self._up.pop(number), now))
            self.instances[number].fail(now)

    def node_s(self, begin_s: float, end_s: float) -> float:
        """Seconds of all nodes that were up in between."""
        lives = [*self._lives, *((number, since, end_s) for number, since in self._up.items())]
        counts = self.world.links.counts
        return sum(counts[number] * max(0.0, min(until, end_s) - max(since, begin_s)) for number, since, until in lives)
