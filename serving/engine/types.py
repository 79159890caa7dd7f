"""Configuration of an engine, and what comes out of it: token events and statistics."""

import dataclasses
from collections.abc import Sequence

from serving.engine.errors import EngineError


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Sizes of one engine.

    Attributes:
        page_size: tokens per page of device memory, the unit of prefix reuse.
        num_pages: pages in the pool; `None` derives it from `kv_bytes`.
        kv_bytes: bytes for the pool over all devices; `None` takes what the device reports as free, or 1 GiB where it
            reports nothing (CPU).
        max_batch: most sequences that decode in one step.
        token_budget: most tokens computed in one step; longer prompts are prefilled in chunks.
        max_prefill_rows: most prompts that share one step's prefill chunk.
        max_model_len: most tokens of one sequence, prompt and output; `None` takes the model's limit.
        prefix_cache: reuse pages of equal prefixes.
        kv_dtype: dtype of the pool; `None` takes the model's.
        attention: paged-attention backend; `None` lets the dispatcher choose.
        seed: seeds requests that sample without a seed of their own.
        deterministic: tokens and log-probabilities of a request depend on nothing but the request: bit for bit the same
            alone, under load, after preemption, after a resume, and in another engine of the same config and mesh. One
            step shape for prefill and one for decode, steps of one kind only, prompt chunks that end at multiples of
            `token_budget`, and tokens once emitted are computed by decode steps again; model/NOTES.md has the cost.
            Without it the order in which sums are rounded follows the load, so log-probabilities differ in their last
            bits, and in bfloat16 tokens do too (4 requests of 8 that were measured).
    """

    page_size: int = 64
    num_pages: int | None = None
    kv_bytes: int | None = None
    max_batch: int = 32
    token_budget: int = 512
    max_prefill_rows: int = 8
    max_model_len: int | None = None
    prefix_cache: bool = True
    kv_dtype: str | None = None
    attention: str | None = None
    seed: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in (
            "page_size",
            "num_pages",
            "kv_bytes",
            "max_batch",
            "token_budget",
            "max_prefill_rows",
            "max_model_len",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise EngineError(f"`{name}` is {value}; it must be at least 1.")
        if self.token_budget <= self.max_batch:
            raise EngineError(
                f"`token_budget` {self.token_budget} leaves nothing for prefill beside `max_batch` {self.max_batch} "
                "decoding sequences; raise the budget or lower the batch."
            )
        if self.deterministic and self.token_budget % self.page_size:
            raise EngineError(
                f"`deterministic` reuses whole chunks of `token_budget` {self.token_budget} tokens; make it a multiple "
                f"of `page_size` {self.page_size}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """One generated token.

    Attributes:
        request_id: of the request that the token belongs to.
        token: token id.
        logprob: log-probability of the token; `None` unless the request asked for log-probabilities.
        top_logprobs: the most likely (token, log-probability) pairs, as many as the request asked for.
        finish_reason: `stop` (end-of-sequence or stop token) or `length` with the last token of a request, else `None`.
        cached_tokens: prompt tokens whose KV was reused.
    """

    request_id: str
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Everything that one request generated.

    Attributes:
        tokens: generated token ids.
        logprobs: log-probability of each token; empty unless the request asked for log-probabilities.
        top_logprobs: the most likely (token, log-probability) pairs beside each token; empty unless asked for.
        finish_reason: `stop` (end-of-sequence or stop token) or `length`.
        cached_tokens: prompt tokens whose KV came from the prefix cache.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...]
    finish_reason: str
    cached_tokens: int

    @classmethod
    def of(cls, events: Sequence[TokenEvent]) -> "Generation":
        """Collects all events of one finished request."""
        reason = events[-1].finish_reason
        assert reason is not None, "the last event of a request has a finish reason"
        logprobs = tuple(event.logprob for event in events if event.logprob is not None)
        return cls(
            tokens=tuple(event.token for event in events),
            logprobs=logprobs,
            top_logprobs=tuple(event.top_logprobs for event in events) if logprobs else (),
            finish_reason=reason,
            cached_tokens=events[0].cached_tokens,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Gauges and counters of an engine.

    Attributes:
        waiting, running: requests without and with pages, now.
        pages_total, pages_used, pages_cached: pages of the pool, those that a request holds, and those that none holds
            but whose KV can be reused, now.
        prompt_tokens, prefix_hit_tokens: prompt tokens of requests that began to compute since the start, and those of
            them whose KV was reused.
        generated_tokens, preemptions, steps: counted since the start.
        compiles_after_warm_up: compilations since `Engine.warm_up`; 0 in a healthy engine.
    """

    waiting: int = 0
    running: int = 0
    pages_total: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    compiles_after_warm_up: int = 0
