"""What the Conductor believes of the cluster: queues, batches, links, and where KV is. Decisions read nothing else.

Beliefs follow decisions (`place`, `release`) at once, and instances as they report (`began`, `loaded`, `moved`). The
mirror reads no clock and calls no instance.
"""

import bisect
import dataclasses
import math
from collections.abc import Callable, Hashable, Sequence

from kvcache.prefix_index import PrefixIndex
from serving.conductor.links import Links
from serving.conductor.load_order import LoadOrder
from serving.conductor.types import Placement
from serving.request import Request


@dataclasses.dataclass(slots=True, kw_only=True)
class Assignment:
    """An accepted request, until it ends, is refused late or is lost.

    Attributes:
        number: place in the order of arrival.
        placed_s: when it was placed.
        prefill_end_s: when its prefill was predicted to end.
        work_s: seconds of prefill for which it keeps the next request waiting, as predicted.
        turn_s: start tag of fair queueing.
        output_tokens: predicted.
        decode_start_s: when its decode started.
        present: whether its KV is on the decode instance.
        fetch_end_s: when the KV that it fetches is predicted to be there.
    """

    number: int
    request: Request
    placement: Placement
    placed_s: float
    prefill_end_s: float
    work_s: float
    turn_s: float
    output_tokens: float
    decode_start_s: float | None = None
    present: bool = False
    fetch_end_s: float = -math.inf


# (queue key, number, work_s, request id) of a request in a prefill queue.
_Entry = tuple[float, int, float, str]


@dataclasses.dataclass(slots=True, kw_only=True)
class PrefillMirror:
    """A prefill (or coupled) instance.

    Attributes:
        name: unique in the cluster.
        index: its bit in the `PrefixIndex`, its place in `ClusterMirror.prefill`, its number among `Links`.
        keeps_running: whether the prompt that is computed counts to the queue until its end, with all its work.
        in_order: whether the instance computes prompts in the order of their queue keys.
        queue: waiting requests in that order; of an instance that `keeps_running`, the running one is the first.
        queued_s: predicted work of those.
        free_s: when the instance can begin the first of `queue`, as it reported.
        running: id of the request that it began last.
    """

    name: str
    index: int
    keeps_running: bool = False
    in_order: bool = True
    queue: list[_Entry] = dataclasses.field(default_factory=list)
    queued_s: float = 0.0
    free_s: float = 0.0
    running: str | None = None

    def queue_s(self, now: float, queue_key: float) -> float:
        """Returns the predicted seconds until a request that sorts at `queue_key` would start."""
        running_s = self.free_s - now if self.free_s > now else 0.0
        queue = self.queue
        if not queue or queue_key >= queue[-1][0] or not self.in_order:
            return running_s + self.queued_s
        ahead = bisect.bisect_right(queue, queue_key, self._begun(), key=lambda entry: entry[0])
        return running_s + sum(entry[2] for entry in queue[:ahead])

    def enqueue(self, assignment: Assignment) -> None:
        work_s = assignment.work_s
        self.queued_s += work_s
        entry = (assignment.placement.queue_key, assignment.number, work_s, assignment.request.id)
        bisect.insort(self.queue, entry, self._begun())

    def began(self, request_id: str | None, free_s: float) -> None:
        """The instance computes `request_id` (`None`: nothing), and expects to begin the next one at `free_s`."""
        self.running = request_id
        if self.keeps_running:
            return
        self.free_s = free_s
        if request_id is not None:
            self._take(request_id)

    def done(self, request_id: str) -> None:
        """The instance has computed a prompt."""
        if self.keeps_running:
            self._take(request_id)

    def withdraw(self, request_id: str) -> None:
        """A request is given up; one that is running is reported by the instance (`began`)."""
        for place, entry in enumerate(self.queue):
            if entry[3] == request_id:
                del self.queue[place]
                self.queued_s -= entry[2]
                return

    def clear(self, now: float) -> None:
        """The instance has died."""
        self.queue.clear()
        self.queued_s, self.running = 0.0, None
        self.free_s = min(self.free_s, now)

    def _begun(self) -> int:
        return int(bool(self.queue) and self.queue[0][3] == self.running)

    def _take(self, request_id: str) -> None:
        queue = self.queue
        place = 0 if queue[0][3] == request_id else next(i for i, entry in enumerate(queue) if entry[3] == request_id)
        work_s = queue.pop(place)[2]
        # An empty queue has no rounding errors.
        self.queued_s = self.queued_s - work_s if queue else 0.0


@dataclasses.dataclass(slots=True, kw_only=True)
class DecodeMirror:
    """A decode (or coupled) instance.

    Attributes:
        name, index: as of a prefill instance, in the decode pool.
        link: its number among `Links`.
        kv_capacity_tokens: device memory for KV.
        requests: those assigned to it, in prefill, in transfer, waiting and running, by id; those that decode are in
            the order in which they started.
        assigned_tokens: prompt tokens of those.
        present: how many of them have their KV there, waiting and running.
        present_tokens: KV tokens of those, as the instance reported.
    """

    name: str
    index: int
    link: int
    kv_capacity_tokens: int
    requests: dict[str, Assignment] = dataclasses.field(default_factory=dict)
    assigned_tokens: int = 0
    present: int = 0
    present_tokens: int = 0

    @property
    def assigned(self) -> int:
        return len(self.requests)


@dataclasses.dataclass(slots=True, kw_only=True)
class ClusterMirror:
    """The cluster as the Conductor believes it to be.

    Attributes:
        prefill, decode: instances by index; those that left keep their place.
        block_size: tokens per block.
        links: the instances' NICs.
        decode_s: seconds of a decode iteration by batch and KV tokens, by which decode instances are ordered.
        link_token_s: seconds to send one token's KV between two NICs.
        coupled: each instance decodes what it prefilled; indices are those of one pool.
        layer_wise: whether KV leaves a prefill instance layer by layer, as it is computed.
        keeps_blocks: whether prefill instances keep KV for reuse.
        slow_token: seconds per token of KV to read it from the second tier, behind prefill; 0 where there is none.
        store: index of a remote store in the directory and among the links, to which prompts are written through.
        directory: holders of blocks, by prefill index; of two tiers where `slow_token` is not 0.
        prefill_order: prefill instances that serve, by the time at which their queue ends.
        decode_order: decode instances that serve, by predicted TBT.
    """

    prefill: list[PrefillMirror]
    decode: list[DecodeMirror]
    block_size: int
    links: Links
    decode_s: Callable[[float, float], float]
    link_token_s: float = 0.0
    coupled: bool = False
    layer_wise: bool = True
    keeps_blocks: bool = True
    slow_token: float = 0.0
    store: int | None = None
    directory: PrefixIndex = dataclasses.field(default_factory=PrefixIndex)
    prefill_order: LoadOrder = dataclasses.field(default_factory=LoadOrder)
    decode_order: LoadOrder = dataclasses.field(default_factory=LoadOrder)

    # -- instances

    def serve_prefill(self, index: int, now: float) -> None:
        """An idle instance joins the prefill pool."""
        self.prefill_order.set(index, now)

    def serve_decode(self, index: int) -> None:
        """An idle instance joins the decode pool."""
        self.decode_order.set(index, self.decode_s(0, 0))

    def lose_prefill(self, index: int, now: float) -> None:
        """A prefill instance died, with its queue and its KV."""
        self.prefill_order.discard(index)
        self.prefill[index].clear(now)
        self.links.reset(index)
        self.forget_blocks(index)

    def lose_decode(self, index: int) -> None:
        """A decode instance died. Its requests stay assigned until each is released or moved."""
        self.decode_order.discard(index)
        self.decode[index].present_tokens = 0
        self.links.reset(self.decode[index].link)

    # -- requests

    def place(self, assignment: Assignment) -> None:
        """Counts an accepted request to the queue, the links and the batch that it was placed on.

        Call `rank` once the prefill instance has taken it, for it may begin at once.
        """
        request, placement = assignment.request, assignment.placement
        if placement.source is not None:
            assignment.fetch_end_s = self._book_fetch(request, placement, assignment.placed_s)
        if self.keeps_blocks and request.keys:
            self.directory.add(placement.prefill, request.keys)
            if self.slow_token:
                self.directory.remove(placement.prefill, request.keys, tier=1)
        self.reserve(assignment)
        self.prefill[placement.prefill].enqueue(assignment)

    def reserve(self, assignment: Assignment) -> None:
        """Counts a request to the load of its decode instance."""
        decode = self.decode[assignment.placement.decode]
        decode.requests[assignment.request.id] = assignment
        decode.assigned_tokens += assignment.request.input_tokens
        self.decode_order.set(decode.index, self.decode_s(len(decode.requests), decode.assigned_tokens))

    def release(self, assignment: Assignment) -> None:
        """Ends what `reserve` began."""
        decode = self.decode[assignment.placement.decode]
        del decode.requests[assignment.request.id]
        decode.assigned_tokens -= assignment.request.input_tokens
        decode.present -= assignment.present
        if decode.index in self.decode_order:
            self.decode_order.set(decode.index, self.decode_s(len(decode.requests), decode.assigned_tokens))
        if self.coupled:
            self.rank(decode.index)

    def prefilled(self, assignment: Assignment) -> None:
        """A prompt is computed."""
        prefill = self.prefill[assignment.placement.prefill]
        prefill.done(assignment.request.id)
        self.rank(prefill.index)

    def decoding(self, assignment: Assignment, now: float) -> None:
        """A request goes on to decode: it moves behind those of its instance that started before it."""
        assignment.decode_start_s = now
        requests = self.decode[assignment.placement.decode].requests
        requests[assignment.request.id] = requests.pop(assignment.request.id)

    def arrived(self, assignment: Assignment) -> None:
        """All KV of a request is on its decode instance."""
        assignment.present = True
        self.decode[assignment.placement.decode].present += 1

    def rank(self, index: int) -> None:
        """Orders a prefill instance anew after its load has changed."""
        if index in self.prefill_order:
            prefill = self.prefill[index]
            load = float(self.decode[index].assigned) if self.coupled else prefill.free_s + prefill.queued_s
            self.prefill_order.set(index, load)

    # -- links

    def fetch_wait_s(self, prefill: int, source: int, now: float) -> float:
        """Returns the predicted seconds before a fetch from `source` could start; coupled instances never fetch."""
        return math.inf if self.coupled else self.links.wait_s(source, prefill, now)

    def hand_over(self, assignment: Assignment, since_s: float, now: float) -> None:
        """Books the transfer of a prompt's KV to its decode instance; layer by layer it leaves from `since_s` on."""
        placement, seconds = assignment.placement, self.link_token_s * assignment.request.input_tokens
        self.links.book(
            placement.prefill, self.decode[placement.decode].link, seconds, since_s if self.layer_wise else now
        )

    def write_through(self, assignment: Assignment, now: float) -> None:
        """Books the transfer of a computed prompt to the remote store, if there is one, as far as it is not there."""
        if self.store is None:
            return
        request, bit = assignment.request, 1 << self.store
        if missing := sum(not self.directory.holders(key) & bit for key in request.keys):
            tokens = min(missing * self.block_size, request.input_tokens)
            self.links.book(assignment.placement.prefill, self.store, self.link_token_s * tokens, now)
        self.directory.add(self.store, request.keys)

    def _book_fetch(self, request: Request, placement: Placement, now: float) -> float:
        source = placement.source
        assert source is not None
        end_s = self.links.book(source, placement.prefill, self.link_token_s * placement.fetched_tokens, now)
        if not self.slow_token or source == self.store:
            return end_s
        size, local = self.block_size, placement.reused_tokens - placement.fetched_tokens
        fetched = request.keys[local // size : -(-placement.reused_tokens // size)]
        bit = 1 << source
        slow = sum(not self.directory.holders(key, tier=0) & bit for key in fetched)
        return max(end_s, now + self.slow_token * slow * size)

    # -- blocks

    def moved(self, holder: int, demoted: Sequence[Hashable], lost: Sequence[Hashable]) -> None:
        """A holder moved blocks to its slow tier, and then lost some."""
        if demoted and self.slow_token:
            self.directory.add(holder, demoted, tier=1)
            self.directory.remove(holder, demoted, tier=0)
        if lost:
            self.directory.remove(holder, lost)

    def forget_blocks(self, holder: int) -> None:
        """A holder has lost all its KV."""
        self.directory.remove_owner(holder)
