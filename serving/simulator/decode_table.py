"""Decode iteration times by table, for instances whose step is no straight line in batch and tokens."""

import bisect
import dataclasses
import itertools
import math

from serving.simulator.errors import SimulatorError

_FOREVER = 1 << 60


@dataclasses.dataclass(frozen=True)
class DecodeTable:
    """Seconds of a decode iteration, `seconds[i][j]` for `batches[i]` sequences of mean context `contexts[j]` tokens.

    Between the entries it is bilinear, below the first constant; longer contexts go on along the last slope, larger
    batches take longer in proportion. With the members of a batch fixed it is therefore linear in their tokens from
    knot to knot, which is what lets a batch be advanced in closed form.

    Raises:
        SimulatorError: fewer than two batches or contexts, not increasing, or a time that is negative, infinite or
            shrinks with the context.
    """

    batches: tuple[float, ...]
    contexts: tuple[float, ...]
    seconds: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        for name in ("batches", "contexts"):
            axis = getattr(self, name)
            if len(axis) < 2 or axis[0] <= 0 or any(b <= a for a, b in itertools.pairwise(axis)):
                raise SimulatorError(
                    f"`{name}` of a decode table must be two or more rising numbers above 0, got {axis}."
                )
        if len(self.seconds) != len(self.batches) or any(len(row) != len(self.contexts) for row in self.seconds):
            raise SimulatorError(f"A decode table needs {len(self.batches)} rows of {len(self.contexts)} seconds.")
        for batch, row in zip(self.batches, self.seconds, strict=True):
            rises = all(a <= b for a, b in itertools.pairwise(row))
            if not (rises and row[0] > 0 and math.isfinite(row[-1])):
                raise SimulatorError(f"Seconds at batch {batch} must be above 0, finite and never fall, got {row}.")

    def decode_s(self, batch: float, tokens: float) -> float:
        """Seconds of an iteration of `batch` sequences with `tokens` of KV in all; 0 for an empty batch."""
        return self._line(batch, tokens / batch)[0] if batch > 0 else 0.0

    def decode_run(self, batch: int, tokens: int) -> tuple[float, float, int]:
        """First term, step and number of the iterations from here that form one arithmetic progression."""
        context = tokens / batch
        first, slope, knot = self._line(batch, context)
        return first, slope, _FOREVER if math.isinf(knot) else max(1, math.floor(knot - context) + 1)

    def _line(self, batch: float, context: float) -> tuple[float, float, float]:
        """Seconds, their slope over the context, and the context up to which the slope holds."""
        batches, contexts = self.batches, self.contexts
        larger = max(1.0, batch / batches[-1])
        i = min(max(bisect.bisect_right(batches, batch) - 1, 0), len(batches) - 2)
        weight = min(max(0.0, (batch - batches[i]) / (batches[i + 1] - batches[i])), 1.0)
        lower, upper = self.seconds[i], self.seconds[i + 1]

        def at(j: int) -> float:
            return (lower[j] + (upper[j] - lower[j]) * weight) * larger

        if context < contexts[0]:
            return at(0), 0.0, contexts[0]
        j = min(bisect.bisect_right(contexts, context) - 1, len(contexts) - 2)
        begin = at(j)
        slope = (at(j + 1) - begin) / (contexts[j + 1] - contexts[j])
        return begin + slope * (context - contexts[j]), slope, contexts[j + 1] if j < len(contexts) - 2 else math.inf
