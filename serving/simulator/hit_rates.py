"""One cache, infinitely fast: what a policy hits of a trace at a capacity, requests in order (FAST'25, Figure 9)."""

import dataclasses

from kvcache.errors import KVCacheError
from kvcache.eviction import POLICIES, Belady, EvictionPolicy, eviction_policy
from serving.simulator.errors import SimulatorError
from serving.workload.requests import Trace

OPTIMUM = "belady"


@dataclasses.dataclass(frozen=True, slots=True)
class Hits:
    """Reuse over a whole trace. A hit is a block of the longest prefix that is here; partial last blocks hold less.

    Attributes:
        tokens, blocks: hit.
        all_tokens, all_blocks: of all prompts.
    """

    tokens: int
    blocks: int
    all_tokens: int
    all_blocks: int

    @property
    def rate(self) -> float:
        """Hit over all prompt tokens."""
        return self.tokens / self.all_tokens


def replay_hits(trace: Trace, policy: EvictionPolicy) -> Hits:
    """Passes every prompt through one cache of `policy.capacity` blocks. Prompts longer than that keep what fits."""
    tokens = blocks = all_blocks = 0
    for request in trace.requests:
        matched = 0
        for block in request.keys:
            if block not in policy:
                break
            matched += 1
        tokens += min(matched * trace.block_size, request.input_tokens)
        blocks += matched
        all_blocks += len(request.keys)
        policy.admit(request.keys, request.arrival_s)
    return Hits(tokens, blocks, sum(request.input_tokens for request in trace.requests), all_blocks)


def named_policy(name: str, capacity_blocks: int, trace: Trace) -> EvictionPolicy:
    """One of `POLICIES`, or `OPTIMUM`, which is told the trace in advance. Raises `SimulatorError` for other names."""
    try:
        if name == OPTIMUM:
            return Belady(capacity_blocks, [request.keys for request in trace.requests])
        return eviction_policy(name, capacity_blocks)
    except KVCacheError as error:
        known = "" if name in POLICIES else f" (and {OPTIMUM}, offline)"
        raise SimulatorError(f"{error}{known}") from error
