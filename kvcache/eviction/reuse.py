"""When blocks are used again, learned online: hits per block and second that keeping a block still earns."""

import numpy as np


class ReuseTimes:
    """Reuse by kind of block and by age since its last use, ages in bins that grow by half an octave.

    `hits[k, b]` counts blocks of kind k used again while their age was in bin b, `passed[k, b]` those that left the bin
    unused. Old counts fade, so that a change of the traffic is followed.
    """

    FIRST_S = 4.0
    BINS = 24
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
        """So many uses have been counted since the last call."""
        keep = 0.5 ** (uses / self._HALF_LIFE_USES)
        self.hits *= keep
        self.passed *= keep

    def rates(self) -> np.ndarray:
        """Probability of a use within a bin, for a block that enters it; float64 [kinds, bins].

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
        """Gittins index of a block at the start of each bin: the most hits per second of keeping it that any time to
        give it up yields; float64 [kinds, bins].

        Evicting the smallest index is optimal where many blocks of independent fate share a cache (the relaxed problem
        has a price per block and second, and a block is kept as long as its index exceeds the price).
        """
        rates = self.rates()
        alive = np.cumprod(1 - rates, axis=1)
        alive = np.concatenate([np.ones((len(rates), 1)), alive[:, :-1]], axis=1)
        hits = np.pad(np.cumsum(alive * rates, axis=1), ((0, 0), (1, 0)))
        kept_s = np.pad(np.cumsum(alive * self.widths_s[None, :] * (1 - rates / 2), axis=1), ((0, 0), (1, 0)))
        worth = np.empty_like(rates)
        for age in range(self.BINS):
            gain = hits[:, age + 1 :] - hits[:, age : age + 1]
            worth[:, age] = (gain / (kept_s[:, age + 1 :] - kept_s[:, age : age + 1])).max(1)
        return worth
