"""How many tokens a single request will generate: what the request that it continues generated, drawn to the mean.

A turn of a conversation repeats the blocks of the turn before it, and one user's answers are alike in length. Where
nothing is known of its prefix, the mean of such requests is predicted.
"""

from collections.abc import Hashable, Sequence

from serving.conductor.estimators import MeanError, OnlineRegression, OutputLengths

# Outputs over their prediction are kept in this unit, for the bins of `OutputLengths`.
_UNIT = 256


class OutputPredictor:
    """Learns from every request that ends.

    Attributes:
        error: of its predictions, in tokens.
    """

    def __init__(self, prior_mean: float = 256.0, entries: int = 100_000) -> None:
        """`entries` prompts are remembered at most, those that ended last."""
        self._by_block: dict[Hashable, tuple[float, int]] = {}
        self._entries = entries
        # On whether something is known of the prefix, and on what.
        self._regression = OnlineRegression((prior_mean, 0.0, 0.0), (1.0, 1.0, prior_mean))
        self._ratios = OutputLengths(_UNIT)
        self.error = MeanError()

    def predict(self, blocks: Sequence[Hashable]) -> float:
        """Tokens that a request with these blocks will generate, at least 1. O(blocks)."""
        return max(1.0, self._regression.predict(self._features(blocks)))

    def observe(self, blocks: Sequence[Hashable], predicted: float, tokens: int) -> None:
        """A request ended that generated so many tokens; `blocks` are those of its prompt that were full."""
        self.error.observe(predicted, tokens)
        self._ratios.observe(int(_UNIT * tokens / predicted))
        self._regression.learn(self._features(blocks[:-1]), tokens)
        if not blocks:
            return
        # A block that many prompts end with says what they have in common: the mean.
        mean, count = self._by_block.pop(blocks[-1], (0.0, 0))
        self._by_block[blocks[-1]] = mean + (tokens - mean) / (count + 1), count + 1
        if len(self._by_block) > self._entries:
            del self._by_block[next(iter(self._by_block))]

    def survival(self, predicted: float, generated: float, more: float) -> float:
        """P(a request predicted at so many tokens that has generated some of them generates at least `more`)."""
        scale = _UNIT / predicted
        return self._ratios.survival(int(generated * scale), more * scale)

    def _features(self, blocks: Sequence[Hashable]) -> tuple[float, float, float]:
        for block in reversed(blocks):
            if (known := self._by_block.get(block)) is not None:
                return 1.0, 1.0, known[0]
        return 1.0, 0.0, 0.0
