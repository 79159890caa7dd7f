"""When blocks are used again, learned online: hits per block and second that keeping a block still earns."""

import numpy as np


class ReuseTimes:
    """Reuse by kind of block and by age since its last use, ages in bins that grow by half an octave.

    The bins reach from 1/64 s to a month, which covers agents and people, small caches and large ones.

    `hits[k, b]` counts blocks of kind k used again while their age was in bin b, `passed[k, b]` those that left the bin
    unused. Old counts fade, so that a change of the traffic is followed.
    """

    FIRST_S = 2.0**-6
    BINS = 56
    # Blocks of one prompt share their fate, so a few dozen blocks are one observation: rates of kinds seen less often
    # than this are mostly those of all blocks.
    _PRIOR_BLOCKS = 100.0
    _PRIOR_RATE = 0.3
    _PRIOR_DECAY = 0.9
    _HALF_LIFE_USES = 400_000

    def __init__(self, kinds: int) -> None:
        self.ends_s = self.FIRST_S * 2 ** (np.arange(self.BINS) / 2)
        self.widths_s = np.diff(self.ends_s, prepend=0.0)
        self.hits = np.zeros((kinds, self.BINS))
        self.passed = np.zeros((kinds, self.BINS))

    def fade(self, uses: int) -> None:
        """Halves the weight of all counts for every `_HALF_LIFE_USES` of the `uses` counted since the last call."""
        keep = 0.5 ** (uses / self._HALF_LIFE_USES)
        self.hits *= keep
        self.passed *= keep

    def rates(self) -> np.ndarray:
        """Returns the probability of a use within a bin, for a block that enters the bin; float64 [kinds, bins].

        Bins without observations continue the one before them, falling slowly (recency); kinds without, all blocks of
        that age, times how often the kind is used again compared with all (proportional hazards).
        """
        prior = self._PRIOR_BLOCKS
        seen = self.hits + self.passed
        all_hits, all_seen = self.hits.sum(0), seen.sum(0)
        common = np.empty(self.BINS)
        rate = self._PRIOR_RATE
        for age in range(self.BINS):
            rate = (all_hits[age] + prior * self._PRIOR_DECAY * rate) / (all_seen[age] + prior)
            common[age] = rate
        ratio = (self.hits.sum(1) + prior) / (seen @ common + prior)
        expected = np.minimum(0.95, ratio[:, None] * common[None, :])
        return (self.hits + prior * expected) / (seen + prior)

    def worth(self) -> np.ndarray:
        """Returns the Gittins index of a block at the start of each bin: the most hits per second of keeping the block
        that any time to give it up yields; float64 [kinds, bins].

        Evicting the smallest index is optimal where many blocks of independent fate share a cache (the relaxed problem
        has a price per block and second, and a block is kept as long as its index exceeds the price).
        """
        rates = self.rates()
        worth, hits, kept_s = np.empty_like(rates), np.zeros_like(rates), np.zeros_like(rates)
        # `hits[:, b]` of a block at the start of bin `age` that is kept through bin b; from the last bin backwards.
        for age in range(self.BINS - 1, -1, -1):
            rate = rates[:, age : age + 1]
            hits[:, age:] = rate + (1 - rate) * hits[:, age:]
            kept_s[:, age:] = (1 - rate / 2) * self.widths_s[age] + (1 - rate) * kept_s[:, age:]
            worth[:, age] = (hits[:, age:] / kept_s[:, age:]).max(1)
        return worth
