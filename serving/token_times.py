"""When the tokens of one request came."""

import dataclasses


@dataclasses.dataclass(slots=True)
class TokenTimes:
    """Arrival times of one request's tokens, in seconds on the clock of whoever records them.

    Attributes:
        first_s: when the first token came; `None` before it.
        last_s: when the latest token came; `None` before the first.
        gaps_s: seconds between consecutive tokens, in order.
        cached_tokens: prompt tokens whose KV was reused.
    """

    first_s: float | None = None
    last_s: float | None = None
    gaps_s: list[float] = dataclasses.field(default_factory=list)
    cached_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that have come."""
        return 0 if self.first_s is None else len(self.gaps_s) + 1

    def record(self, now_s: float, tokens: int = 1) -> None:
        """Records `tokens` (at least 1) tokens that came together at `now_s`; all but the first have gaps of 0."""
        if self.last_s is None:
            self.first_s = now_s
        else:
            self.gaps_s.append(now_s - self.last_s)
        self.gaps_s += [0.0] * (tokens - 1)
        self.last_s = now_s
