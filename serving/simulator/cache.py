"""The KVCache of one node: host memory and SSD, in blocks; an eviction policy per tier."""

from collections.abc import Hashable, Iterable, Sequence

from kvcache.eviction import POLICIES, eviction_policy

EVICTIONS = POLICIES


class NodeCache:
    """Blocks of one node by tier: what host memory evicts goes to SSD, and comes back when it is used."""

    def __init__(self, host_blocks: int, ssd_blocks: int = 0, eviction: str = "lru") -> None:
        self._ssd_limit = ssd_blocks
        self._host = eviction_policy(eviction, max(1, host_blocks))
        self._ssd = eviction_policy(eviction, max(1, ssd_blocks))

    def touch(self, blocks: Sequence[Hashable], now: float) -> tuple[list[Hashable], list[Hashable]]:
        """Puts a prompt's blocks into host memory. Returns blocks that went to SSD for them, and those that left the
        node for good, some of the former perhaps among them.
        """
        host, ssd = self._host, self._ssd
        if len(ssd):
            for block in blocks:
                if block in ssd:
                    ssd.remove(block)
        evicted = host.admit(blocks, now)
        if len(blocks) > host.capacity:
            # Some policies keep the beginning of a prompt that is too long; its end has never been in memory.
            known = set(evicted)
            evicted += [block for block in dict.fromkeys(blocks) if block not in host and block not in known]
        if not self._ssd_limit:
            return [], evicted
        lost = []
        for block in evicted:
            if len(ssd) == self._ssd_limit:
                lost.append(ssd.evict())
            ssd.insert(block, now)
        return evicted, lost

    def on_ssd(self, blocks: Iterable[Hashable]) -> int:
        """How many of `blocks` are on SSD only."""
        ssd = self._ssd
        return sum(block in ssd for block in blocks) if len(ssd) else 0

    def discard(self, blocks: Iterable[Hashable]) -> list[Hashable]:
        """Forgets blocks; returns those that were there."""
        lost = []
        for block in blocks:
            for tier in (self._host, self._ssd):
                if block in tier:
                    tier.remove(block)
                    lost.append(block)
        return lost

    def clear(self) -> list[Hashable]:
        """Loses everything; returns what was there."""
        lost = [*self._host, *self._ssd]
        for tier in (self._host, self._ssd):
            for block in [*tier]:
                tier.remove(block)
        return lost

    def __contains__(self, block: Hashable) -> bool:
        return block in self._host or block in self._ssd

    def __len__(self) -> int:
        return len(self._host) + len(self._ssd)
