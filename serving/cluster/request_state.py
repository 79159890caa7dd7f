"""A request on its way through a cluster."""

import dataclasses
import enum
from collections.abc import Sequence

from serving.cluster.gaps import Progression, longest_mean
from serving.cluster.instance import Task
from serving.request import Request


class Phase(enum.Enum):
    """Where a request is: not placed yet, with its prefill instance, between both, with its decode instance, done."""

    QUEUED = "queued"
    PREFILL = "prefill"
    TRANSFER = "transfer"
    DECODE = "decode"
    ENDED = "ended"


@dataclasses.dataclass(slots=True, kw_only=True)
class ResumedProgress:
    """What a request had got when an instance died under it; it goes on elsewhere from there.

    Attributes:
        prefill: index of the instance that gave its first token.
        hit_tokens: prompt tokens that were reused there.
        first_token_s, last_token_s: when those came.
        tokens: generated until then.
        gaps: between all tokens so far.
    """

    prefill: int
    hit_tokens: int
    first_token_s: float
    last_token_s: float
    tokens: int
    gaps: list[Progression]


@dataclasses.dataclass(slots=True, kw_only=True)
class RequestState:
    """One attempt to serve a request. `task` is what was decided, the other fields are facts; times in seconds.

    Attributes:
        number: in the order of arrival.
        arrived: the request as it arrived; `request` is what is left of it.
        attempt: counts placements and transfers.
        task: what the instances were asked to do; `None` before it is placed.
        started_s: when its prefill began.
        compute_s: device time of its prefill.
        hit_tokens: prompt tokens that were reused.
        first_token_s, last_token_s: of this attempt, as far as reported.
        gaps: between those.
        tbt_s: mean of its longest tenth of gaps, once it ended.
        resumed: what it had got before an instance died, if one did.
    """

    number: int
    arrived: Request
    request: Request
    attempt: int = 0
    phase: Phase = Phase.QUEUED
    task: Task | None = None
    started_s: float | None = None
    compute_s: float = 0.0
    hit_tokens: int = 0
    first_token_s: float | None = None
    last_token_s: float | None = None
    gaps: Sequence[Progression] | None = None
    tbt_s: float | None = None
    resumed: ResumedProgress | None = None

    @property
    def tokens(self) -> int:
        """Tokens that came, those of earlier attempts included, as far as reported."""
        tokens = 0 if self.first_token_s is None else 1
        for _, _, count in self.gaps or ():
            tokens += count
        return tokens if self.resumed is None else tokens + self.resumed.tokens

    def first_token(self, now: float) -> None:
        self.first_token_s = self.last_token_s = now
        if (resumed := self.resumed) is not None:
            resumed.gaps.append((now - resumed.last_token_s, 0.0, 1))
            resumed.last_token_s = now

    def more_tokens(self, gaps: Sequence[Progression], last_s: float) -> None:
        self.gaps = gaps if self.gaps is None else [*self.gaps, *gaps]
        self.last_token_s = last_s

    def finish(self) -> int:
        """Sets the TBT of all gaps, if there are any; returns the number of all tokens."""
        tokens, resumed = self.tokens, self.resumed
        gaps = self.gaps or ()
        if resumed is not None:
            gaps = [*resumed.gaps, *gaps]
        if tokens > 1:
            self.tbt_s = longest_mean(gaps, max(1, (tokens - 1) // 10))
        return tokens

    def remember(self) -> None:
        """Keeps what it got of this attempt for the next one."""
        if self.first_token_s is None or self.last_token_s is None or self.task is None:
            return
        tokens, gaps = self.tokens, self.gaps or ()
        if self.resumed is None:
            self.resumed = ResumedProgress(
                prefill=self.task.placement.prefill,
                hit_tokens=self.hit_tokens,
                first_token_s=self.first_token_s,
                last_token_s=self.last_token_s,
                tokens=tokens,
                gaps=[*gaps],
            )
        else:
            self.resumed.gaps += gaps
            self.resumed.tokens = tokens
            self.resumed.last_token_s = self.last_token_s
