"""A request on its way through the simulated cluster."""

import dataclasses
from collections.abc import Iterable

from serving.conductor import Placement
from serving.request import TraceRequest
from serving.simulator.gaps import Progression, longest_mean


@dataclasses.dataclass(slots=True, kw_only=True)
class ResumedProgress:
    """What a request had got when a node died under it; it goes on elsewhere from there.

    Attributes:
        request: as it arrived.
        prefill: index of the instance that gave its first token; `hit_tokens` were reused there.
        first_token_s, last_token_s: when those came.
        tokens: generated until then.
        gaps: between all tokens so far.
    """

    request: TraceRequest
    prefill: int
    hit_tokens: int
    first_token_s: float
    last_token_s: float
    tokens: int
    gaps: list[Progression]

    def rest(self, block_size: int, now: float) -> TraceRequest:
        """What is left to do: the generated tokens are prompt now, behind the blocks that were full."""
        request = self.request
        return dataclasses.replace(
            request,
            arrival_s=now,
            input_tokens=request.input_tokens + self.tokens,
            output_tokens=request.output_tokens - self.tokens,
            keys=request.keys[: request.input_tokens // block_size],
        )


@dataclasses.dataclass(slots=True, kw_only=True)
class RequestState:
    """Mutable state of one request; times in seconds of the simulation.

    Attributes:
        number: in order of arrival; where queues and batches order requests alike, the one that arrived first leads.
        resumed: what it had got before a node died, if one did.
        placed_s: when the Conductor placed it.
        fetched_s: when KV fetched from another node is here.
        ssd_tokens: reused tokens that the prefill node must read from SSD.
        prefill_s: execution of its prefill, waiting for KV to load included.
        compute_s: device time of its prefill.
        arrives_s: when its KV is in the decode node, while it is on its way.
        first_gap_s: from the first token to the second.
        tbt_s: mean of its longest tenth of gaps, once it ended.
        log_start: first entry of the batch's log that it saw.
    """

    number: int
    request: TraceRequest
    placement: Placement
    resumed: ResumedProgress | None = None
    placed_s: float = 0.0
    fetched_s: float = 0.0
    ssd_tokens: int = 0
    started_s: float = 0.0
    prefill_s: float = 0.0
    compute_s: float = 0.0
    first_token_s: float = 0.0
    arrives_s: float = 0.0
    first_gap_s: float = 0.0
    log_start: int = 0
    tbt_s: float | None = None

    def fetches_from(self, source: int, now: float) -> bool:
        """Whether its prefill waits for KV that is on its way from there."""
        return self.placement.source == source and self.fetched_s > now and not self.first_token_s

    def remember(self, gaps: list[Progression], last_token_s: float) -> None:
        """Keeps what it got on a node that is dying: `gaps` since its last prefill."""
        tokens = 1 + sum(count for _, _, count in gaps)
        if self.resumed is None:
            placement = self.placement
            self.resumed = ResumedProgress(
                request=self.request,
                prefill=placement.prefill,
                hit_tokens=placement.reused_tokens,
                first_token_s=self.first_token_s,
                last_token_s=last_token_s,
                tokens=tokens,
                gaps=[*gaps],
            )
            return
        self.resumed.gaps += gaps
        self.resumed.tokens += tokens
        self.resumed.last_token_s = last_token_s

    def longest_gaps_s(self, gaps: Iterable[Progression]) -> float:
        """TBT: mean of the longest tenth of all gaps, `gaps` being those since its last prefill."""
        resumed = self.resumed
        if resumed is None:
            return longest_mean(gaps, max(1, (self.request.output_tokens - 1) // 10))
        return longest_mean([*resumed.gaps, *gaps], max(1, (resumed.request.output_tokens - 1) // 10))
