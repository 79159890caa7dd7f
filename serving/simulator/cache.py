"""The KVCache of one node: host memory and SSD, in blocks, least recently used out first."""

from collections.abc import Iterable, Sequence

from serving.simulator.errors import SimulatorError

EVICTIONS = ("lru", "fifo")


class NodeCache:
    """Blocks of one node by tier.

    A prompt's blocks are touched from the last to the first, so a block never leaves before its children: what stays
    is always a prefix.
    """

    def __init__(self, host_blocks: int, ssd_blocks: int = 0, eviction: str = "lru") -> None:
        if eviction not in EVICTIONS:
            raise SimulatorError(f"No eviction `{eviction}`; known: {', '.join(EVICTIONS)}.")
        self._host_limit, self._ssd_limit = host_blocks, ssd_blocks
        self._moves = eviction == "lru"
        self._host: dict[int, None] = {}
        self._ssd: dict[int, None] = {}

    def touch(self, blocks: Sequence[int]) -> list[int]:
        """Puts a prompt's blocks into host memory, and returns blocks that left the node for good."""
        host, ssd = self._host, self._ssd
        for block in reversed(blocks):
            if block in host:
                if self._moves:
                    del host[block]
                    host[block] = None
            else:
                ssd.pop(block, None)
                host[block] = None
        lost = []
        for _ in range(len(host) - self._host_limit):
            block = next(iter(host))
            del host[block]
            if self._ssd_limit:
                ssd[block] = None
            else:
                lost.append(block)
        for _ in range(len(ssd) - self._ssd_limit):
            block = next(iter(ssd))
            del ssd[block]
            lost.append(block)
        return lost

    def on_ssd(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` are on SSD only."""
        ssd = self._ssd
        return sum(block in ssd for block in blocks) if ssd else 0

    def clear(self) -> list[int]:
        """Loses everything; returns what was there."""
        lost = [*self._host, *self._ssd]
        self._host.clear()
        self._ssd.clear()
        return lost

    def __len__(self) -> int:
        return len(self._host) + len(self._ssd)
