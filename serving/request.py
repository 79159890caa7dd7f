"""One request, whoever serves it: a live engine, a cluster, or a simulation of one."""

import dataclasses
from collections.abc import Hashable, Sequence

from model.sampling_params import SamplingParams

_GREEDY = SamplingParams(temperature=0.0)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One sequence to generate.

    Attributes:
        id: unique among the requests that its server holds.
        arrival_s: seconds on the server's clock; earlier requests are served first within a priority.
        prompt: token ids, each 0 or more; empty where only the prompt's length is known, as in a trace.
        input_tokens: prompt length; counted where `prompt` is given.
        keys: chained keys of the prompt's pages from the first on, hashed once where the request enters. Equal keys
            mean equal prefixes. The key of a block of n pages is the key of its last page, `keys[n - 1 :: n]`.
        tenant: whose request it is; fair queueing shares prefill among tenants.
        priority: lower is served first, and preempted last.
        salt: requests share KV only with requests of the same salt.
        sampling: how to choose tokens and when to stop.
    """

    id: str
    arrival_s: float = 0.0
    prompt: tuple[int, ...] = ()
    input_tokens: int = 0
    keys: tuple[Hashable, ...] = ()
    tenant: str = ""
    priority: int = 0
    salt: str = ""
    sampling: SamplingParams = _GREEDY

    def __post_init__(self) -> None:
        if self.prompt:
            object.__setattr__(self, "input_tokens", len(self.prompt))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest(Request):
    """One request of a workload, whose output length is known beforehand. No scheduler may read that length.

    Attributes:
        keys: numbers of the prompt's blocks, the partial last one included; of blocks as long as the trace says.
        output_tokens: tokens to generate, at least 1.
    """

    keys: tuple[int, ...] = ()
    output_tokens: int

    def with_prompt(self, prompt: Sequence[int]) -> Request:
        """Returns the request that an engine serves: `prompt`, and greedily exactly `output_tokens` tokens.

        It has no keys, because those of the trace are of other blocks than the engine's pages.
        """
        return Request(
            id=self.id,
            arrival_s=self.arrival_s,
            prompt=tuple(prompt),
            tenant=self.tenant,
            priority=self.priority,
            salt=self.salt,
            sampling=SamplingParams(temperature=0.0, max_tokens=self.output_tokens, ignore_eos=True),
        )
