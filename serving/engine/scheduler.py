"""Which tokens the next step computes: continuous batching, chunked prefill, preemption, prefix reuse. Knows no JAX."""

import dataclasses
import heapq
import logging

from kvcache.allocator import PageAllocator
from kvcache.layout import KVLayout
from serving.engine.errors import RequestRefusedError
from serving.engine.sequence import Sequence
from serving.engine.types import EngineConfig
from serving.request import Request

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Work of one step: sequences that decode one token each, and (sequence, tokens) prefill chunks."""

    decodes: tuple[Sequence, ...]
    prefills: tuple[tuple[Sequence, int], ...]

    def __bool__(self) -> bool:
        return bool(self.decodes or self.prefills)


class Scheduler:
    """Queues and pages of one engine.

    Within a priority, requests are served in order of arrival. A sequence is admitted when pages for all its known
    tokens are available, so a prompt never stalls half prefilled; when a decoding sequence finds no page for its next
    token, the running sequence that is last in order gives its pages up and waits again. Its full pages stay cached,
    so what it lost is mostly found again.
    """

    def __init__(self, config: EngineConfig, layout: KVLayout, max_model_len: int, eos_ids: frozenset[int]):
        self.allocator = PageAllocator(layout.num_pages)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []  # heap
        self.preemptions = 0
        self.prompt_tokens = 0
        self.prefix_hit_tokens = 0
        self._config = config
        self._layout = layout
        self._max_model_len = max_model_len
        self._eos_ids = eos_ids
        self._by_id: dict[str, Sequence] = {}
        self._order = 0

    def add(self, request: Request) -> None:
        """Queues `request`. Raises `RequestRefusedError` if it can never be served."""
        self._check(request)
        max_pages = self._layout.pages_for(self._max_model_len)
        sequence = Sequence(request, self._order, max_pages, self._layout.page_size, self._eos_ids)
        self._order += 1
        self._by_id[request.id] = sequence
        heapq.heappush(self.waiting, sequence)

    def abort(self, request_id: str) -> bool:
        """Drops a request wherever it is and frees its pages; `False` if it is not here (any more)."""
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        self.finish(sequence)
        return True

    def finish(self, sequence: Sequence) -> None:
        """Removes `sequence`; its full pages stay cached."""
        del self._by_id[sequence.request.id]
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
            heapq.heapify(self.waiting)
        self.allocator.release(sequence.stop())

    def plan(self) -> StepPlan:
        """Chooses the next step's work and takes the pages that it needs."""
        decodes = self._plan_decodes()
        budget = self._config.token_budget - len(decodes)
        prefills: list[tuple[Sequence, int]] = []
        unfinished = [sequence for sequence in self.running if sequence.pending > 1]
        while budget and len(prefills) < self._config.max_prefill_rows:
            sequence = unfinished.pop(0) if unfinished else self._admit()
            if sequence is None:
                break
            tokens = min(sequence.pending, budget)
            prefills.append((sequence, tokens))
            budget -= tokens
        return StepPlan(tuple(decodes), tuple(prefills))

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """Records that KV of `tokens` more tokens is in the pool, and publishes pages that this filled."""
        sequence.computed += tokens
        if self._config.prefix_cache:
            for page, key in sequence.unpublished():
                self.allocator.publish(page, key)

    def _check(self, request: Request) -> None:
        prompt, limit = len(request.prompt), self._max_model_len
        if request.id in self._by_id:
            raise RequestRefusedError(f"request id {request.id!r} is already in the engine; choose another.")
        if not prompt:
            raise RequestRefusedError("the prompt has no tokens; send at least one.")
        # The last token needs no KV, so a prompt may leave room for exactly one output token.
        total = prompt + request.sampling.max_tokens
        if total > limit:
            raise RequestRefusedError(
                f"{prompt} prompt tokens + max_tokens {request.sampling.max_tokens} = {total} exceed the model length "
                f"{limit}; shorten the prompt or lower `max_tokens` to at most {max(limit - prompt, 0)}."
            )
        needed = self._layout.pages_for(total - 1)
        if needed > self.allocator.num_pages:
            raise RequestRefusedError(
                f"{total} tokens need {needed} pages of {self._layout.page_size} tokens, the pool has "
                f"{self.allocator.num_pages}; shorten the request or give the engine more KV memory."
            )

    def _plan_decodes(self) -> list[Sequence]:
        """Running sequences that decode, each with a page for its next token, after preempting where there is none."""
        decodes: list[Sequence] = []
        for sequence in sorted(self.running):
            if sequence.pending != 1 or sequence not in self.running:
                continue
            while (
                self._layout.pages_for(len(sequence.tokens)) > sequence.page_table.length and sequence in self.running
            ):
                if self.allocator.available:
                    sequence.page_table.extend(self.allocator.allocate(1))
                else:
                    self._preempt(max(self.running))
            if sequence in self.running:
                decodes.append(sequence)
        return decodes

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.allocator.release(sequence.stop())
        heapq.heappush(self.waiting, sequence)
        self.preemptions += 1
        _logger.debug("request %s preempted after %d tokens", sequence.request.id, sequence.generated)

    def _admit(self) -> Sequence | None:
        """Starts the first waiting sequence if its pages and a place in the batch are available."""
        if not self.waiting or len(self.running) >= self._config.max_batch:
            return None
        sequence = self.waiting[0]
        cached: list[int] = []
        if self._config.prefix_cache:
            # The last token is always computed: its logits choose the next one.
            usable = (len(sequence.tokens) - 1) // self._layout.page_size
            cached = self.allocator.lookup(sequence.keys()[:usable])
        new = self._layout.pages_for(len(sequence.tokens)) - len(cached)
        # One page of growth for every running sequence: admitting must not cause the very next preemption.
        if new + len(self.running) > self.allocator.available - self.allocator.unreferenced(cached):
            return None
        heapq.heappop(self.waiting)
        self.allocator.acquire(cached)
        first = not sequence.admitted
        sequence.start(cached, self.allocator.allocate(new))
        self.running.append(sequence)
        _logger.debug(
            "request %s admitted: %d of %d tokens cached",
            sequence.request.id,
            sequence.computed,
            len(sequence.tokens),
        )
        if first:
            self.prompt_tokens += len(sequence.request.prompt)
            self.prefix_hit_tokens += sequence.cached_tokens
        return sequence
