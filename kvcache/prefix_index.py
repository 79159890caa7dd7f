"""Which owner holds which block, in which tier: the global view of the KVCache that placement decides on.

(Mooncake, section 3.2.) An owner is a bit, a block's holders an integer. A prompt's longest match on *every* owner is
found in one walk over its blocks with one `and` per block, whatever the number of owners.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence

from kvcache.errors import KVCacheError


def members(mask: int) -> Iterator[int]:
    """Yields the indices of the set bits, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


class PrefixIndex:
    """Holders of blocks, as integers with one bit per owner; optionally by tier, the fastest being tier 0."""

    def __init__(self, tiers: int = 1) -> None:
        if tiers < 1:
            raise KVCacheError(f"`tiers` is {tiers}; blocks are in at least one.")
        # One tier is its own union; with several, the union is kept beside them so that a match reads one table.
        self._tiers: list[dict[Hashable, int]] = [{} for _ in range(tiers)]
        self._any: dict[Hashable, int] = self._tiers[0] if tiers == 1 else {}

    def match(self, blocks: Sequence[Hashable], tier: int | None = None) -> list[tuple[int, int]]:
        """Returns the longest contiguous match of each owner: [(matched blocks, mask of owners), ...], longest first.

        Args:
            blocks: keys of a prompt's blocks, from the first.
            tier: counts only blocks in this tier; `None` takes a block from wherever the owner has it.

        Owners without the first block are in no group. O(longest match).
        """
        groups: list[tuple[int, int]] = []
        holders = self._any if tier is None else self._tiers[tier]
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

    def holders(self, block: Hashable, tier: int | None = None) -> int:
        """Returns the mask of the owners that hold a block, in `tier` or anywhere."""
        return (self._any if tier is None else self._tiers[tier]).get(block, 0)

    def add(self, owner: int, blocks: Iterable[Hashable], tier: int = 0) -> None:
        """Records that an owner holds blocks in a tier, beside the tiers where it has them already."""
        bit = 1 << owner
        blocks = blocks if len(self._tiers) == 1 else list(blocks)
        _set(self._tiers[tier], bit, blocks)
        if len(self._tiers) > 1:
            _set(self._any, bit, blocks)

    def remove(self, owner: int, blocks: Iterable[Hashable], tier: int | None = None) -> None:
        """Records that an owner lost blocks from one tier, or from all."""
        bit = 1 << owner
        if len(self._tiers) == 1:
            _clear(self._any, bit, blocks)
            return
        blocks = list(blocks)
        for holders in self._tiers if tier is None else [self._tiers[tier]]:
            _clear(holders, bit, blocks)
        _clear(self._any, bit, [b for b in blocks if not any(held.get(b, 0) & bit for held in self._tiers)])

    def remove_owner(self, owner: int) -> None:
        """Records that an owner lost all its blocks. O(blocks of all owners)."""
        bit = 1 << owner
        self.remove(owner, [block for block, holders in self._any.items() if holders & bit])

    def __len__(self) -> int:
        return len(self._any)


def _set(holders: dict[Hashable, int], bit: int, blocks: Iterable[Hashable]) -> None:
    for block in blocks:
        holders[block] = holders.get(block, 0) | bit


def _clear(holders: dict[Hashable, int], bit: int, blocks: Iterable[Hashable]) -> None:
    for block in blocks:
        left = holders.get(block, 0) & ~bit
        if left:
            holders[block] = left
        else:
            holders.pop(block, None)
