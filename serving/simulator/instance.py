"""One simulated node, or a group of nodes: what a Coordinator asks of it takes time, and nothing else."""

from serving.cluster.instance import Task
from serving.conductor import PrefillReport
from serving.simulator.coupled_node import CoupledNode
from serving.simulator.decode_node import DecodeNode
from serving.simulator.engine_node import EngineNode
from serving.simulator.prefill_node import PrefillNode
from serving.simulator.simulated_request import SimulatedRequest
from serving.simulator.world import World


class SimulatedInstance:
    """An `Instance` whose roles are played by nodes.

    Attributes:
        name, epoch: as of any instance.
        number: its prefill index, its number among the links and caches.
    """

    def __init__(self, name: str, number: int, world: World) -> None:
        """Give it its nodes (`equip`) before it is asked anything."""
        self.name, self.number = name, number
        self.epoch = 0
        self._world = world
        self._cache = world.caches[number]
        self._prefill: PrefillNode | CoupledNode | EngineNode | None = None
        self._decode: DecodeNode | EngineNode | None = None
        # By decode index, whose links KV is sent to.
        self._links: list[int] = []

    def equip(
        self,
        prefill: PrefillNode | CoupledNode | EngineNode | None,
        decode: DecodeNode | EngineNode | None,
        links: list[int],
    ) -> None:
        """Nodes of either role that it can play; `links` are the link numbers of all decode instances by index."""
        self._prefill, self._decode, self._links = prefill, decode, links

    def prefill(self, task: Task, now: float) -> None:
        assert self._prefill is not None
        world, placement = self._world, task.placement
        state = world.requests[task.request.id] = SimulatedRequest.of(task)
        if world.config.ssd_blocks:
            state.ssd_tokens = self._ssd_tokens(state)
        if placement.source is not None:
            state.fetched_s = world.fetch(state, placement.source, now)
        if world.config.host_blocks and task.request.keys:
            demoted, lost = self._cache.touch(task.request.keys, now)
            if demoted or lost:
                world.events.moved(self.number, demoted, lost)
        self._prefill.enqueue(state, now)

    def hand_over(self, task: Task, now: float) -> None:
        world, state = self._world, self._world.requests[task.request.id]
        since_s = now if state.sent else state.started_s
        state.sent, state.attempt, state.placement = True, task.attempt, task.placement
        arrives_s = world.hand_over(state, self._links[task.placement.decode], since_s, now)
        world.at(arrives_s, self._arrived, (task.request.id, task.attempt))

    def _arrived(self, sent: tuple[str, int], now: float) -> None:
        self._world.events.arrived(*sent, now)

    def decode(self, task: Task, now: float) -> None:
        assert self._decode is not None
        self._decode.join(self._world.requests[task.request.id], now)

    def abort(self, request_id: str, now: float) -> None:
        """Drops a request, and the blocks that its prefill would have brought."""
        state, prefill = self._world.requests[request_id], self._prefill
        if isinstance(prefill, EngineNode):
            prefill.withdraw(request_id, now)
        elif isinstance(prefill, PrefillNode) and state.first_token_s is None:
            prefill.withdraw(request_id, now)
            local = (state.placement.reused_tokens - state.placement.fetched_tokens) // self._world.block_size
            self._world.events.moved(self.number, (), self._cache.discard(state.request.keys[local:]))

    def switch(self, now: float) -> None:
        self._cache.clear()
        self._world.at(now + self._world.config.switch_s, self._switched, self.epoch)

    def _switched(self, epoch: int, now: float) -> None:
        if epoch == self.epoch:
            self._world.events.switched(self.name, now)

    def fail(self, now: float) -> None:
        """Dies, with all that it holds; reports first what was done until now."""
        self.epoch += 1
        if self._prefill is not None:
            self._prefill.fail(now)
        if self._decode is not None and self._decode is not self._prefill:
            self._decode.fail(now)
        self._cache.clear()
        self._world.links.reset(self.number)
        self._world.events.lost(self.name, now)

    def prefilled(self, state: SimulatedRequest, now: float) -> None:
        """Its node has computed a prompt."""
        state.first_token_s = now
        report = PrefillReport(
            started_s=state.started_s,
            fetched_s=state.fetched_s,
            execution_s=state.prefill_s,
            compute_s=state.compute_s,
            reused_tokens=state.reused_tokens,
            slow_tokens=state.ssd_tokens,
            decodes=state.request.output_tokens > 1,
        )
        world = self._world
        world.events.prefilled(state.request.id, state.attempt, report, now)
        if world.store is not None:
            # Behind what decode waits for.
            world.store.write(state.request, self.number, world.block_size, now)

    def _ssd_tokens(self, state: SimulatedRequest) -> int:
        """Tokens among those that a request reuses here that must come from SSD."""
        placement, size = state.placement, self._world.block_size
        local = placement.reused_tokens - placement.fetched_tokens
        if isinstance(self._prefill, EngineNode) or local <= 0:
            return 0
        return min(local, self._cache.on_ssd(state.request.keys[: -(-local // size)]) * size)
