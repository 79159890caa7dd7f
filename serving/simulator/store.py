"""A remote store behind the caches of all nodes: KV that is written through to it survives them."""

from kvcache.prefix_index import PrefixIndex
from serving.request import TraceRequest
from serving.simulator.cache import NodeCache
from serving.simulator.nodes import Nic, transfer
from serving.simulator.performance import Performance


class RemoteStore:
    """To the Conductor one more holder of blocks, which nodes fetch from as from each other."""

    def __init__(self, index: int, cache: NodeCache, nic: Nic, performance: Performance) -> None:
        """`index` is its bit in the directory, beyond all instances."""
        self.index, self.cache, self.nic = index, cache, nic
        self._performance = performance
        self.written_tokens = 0

    def write(self, request: TraceRequest, sender: Nic, directory: PrefixIndex, block_size: int, now: float) -> None:
        """Writes the blocks of a computed prompt that are not here yet; those that are count as used."""
        blocks, bit = request.keys, 1 << self.index
        missing = sum(not directory.holders(block) & bit for block in blocks)
        if missing:
            tokens = min(missing * block_size, request.input_tokens)
            transfer(sender, self.nic, self._performance.costs.transfer_s(tokens), now)
            self.written_tokens += tokens
        directory.add(self.index, blocks)
        if lost := self.cache.touch(blocks, now)[1]:
            directory.remove(self.index, lost)
