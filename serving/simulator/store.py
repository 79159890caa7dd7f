"""A remote store behind the caches of all nodes: KV that is written through to it survives them."""

from serving.cluster.instance import Events
from serving.conductor.links import Links
from serving.request import TraceRequest
from serving.simulator.cache import NodeCache


class RemoteStore:
    """To the Conductor one more holder of blocks, which nodes fetch from as from each other.

    Attributes:
        index: its bit in the directory and its number among the links, beyond all nodes.
    """

    def __init__(self, *, index: int, cache: NodeCache, links: Links, token_s: float, events: Events) -> None:
        """`token_s` is what one token's KV takes over a node's NIC."""
        self.index, self.cache = index, cache
        self.written_tokens = 0
        self._links, self._token_s, self._events = links, token_s, events

    def write(self, request: TraceRequest, sender: int, block_size: int, now: float) -> None:
        """Writes the blocks of a computed prompt that are not here yet; those that are count as used."""
        if missing := sum(block not in self.cache for block in request.keys):
            tokens = min(missing * block_size, request.input_tokens)
            self._links.book(sender, self.index, self._token_s * tokens, now)
            self.written_tokens += tokens
        if lost := self.cache.touch(request.keys, now)[1]:
            self._events.moved(self.index, (), lost)
