"""Which instance holds which block: the global view of the KVCache that placement decides on (Mooncake, section 3.2).

An instance is a bit, a block's holders an integer. A prompt's longest match on *every* instance is found in one walk
over its blocks with one `and` per block, whatever the number of instances.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence


def members(mask: int) -> Iterator[int]:
    """Indices of the set bits, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class CacheDirectory:
    """Holders of blocks, as integers with one bit per instance."""

    def __init__(self) -> None:
        self._holders: dict[Hashable, int] = {}

    def match(self, blocks: Sequence[Hashable]) -> list[tuple[int, int]]:
        """Longest contiguous match per instance: [(matched blocks, mask of instances), ...], longest first.

        Instances without the first block are in no group. O(longest match).
        """
        groups: list[tuple[int, int]] = []
        holders = self._holders
        if not blocks or not (mask := holders.get(blocks[0], 0)):
            return groups
        depth = 1
        for depth, block in enumerate(blocks):
            kept = mask & holders.get(block, 0)
            if kept != mask:
                groups.append((depth, mask ^ kept))
                mask = kept
                if not mask:
                    break
        else:
            groups.append((depth + 1, mask))
        groups.reverse()
        return groups

    def holders(self, block: Hashable) -> int:
        """Mask of the instances that hold a block."""
        return self._holders.get(block, 0)

    def add(self, instance: int, blocks: Iterable[Hashable]) -> None:
        """Records that an instance holds blocks."""
        bit = 1 << instance
        holders = self._holders
        for block in blocks:
            holders[block] = holders.get(block, 0) | bit

    def remove(self, instance: int, blocks: Iterable[Hashable]) -> None:
        """Records that an instance lost blocks."""
        keep = ~(1 << instance)
        holders = self._holders
        for block in blocks:
            left = holders.get(block, 0) & keep
            if left:
                holders[block] = left
            else:
                holders.pop(block, None)

    def __len__(self) -> int:
        return len(self._holders)
