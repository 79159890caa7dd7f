"""Which tokens the next step computes: continuous batching, chunked prefill, preemption, prefix reuse. Knows no JAX."""

import dataclasses
import heapq
import logging
from collections.abc import Sequence as Items

from kvcache.allocator import PageAllocator
from kvcache.blocks import Namespace
from kvcache.eviction import LRU
from kvcache.layout import KVLayout
from serving.engine.checks import check_lengths, prompt_keys
from serving.engine.errors import EngineError, RequestRefusedError
from serving.engine.loader import KVLoader
from serving.engine.sequence import Sequence, SequencePhase
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
    tokens are available, so a prompt never stalls half prefilled. When a decoding sequence finds no page for its next
    token, the last of the sequences that compute gives its pages up and waits again; its full pages stay cached, so
    most of what it lost is found again.

    A sequence whose KV a `loader` can bring is admitted as LOADING: the sequence has its pages and its place in the
    batch, and no step computes it until `loaded`. A LOADING sequence is never preempted, because its pages could not be
    used before the load ends; one that is aborted keeps its pages until then.

    In a deterministic engine, steps are prefill or decode in turn, prompt chunks end at multiples of the token budget,
    whole chunks alone are reused, and a sequence that starts again has its emitted tokens computed by decode steps.

    Attributes:
        allocator: pages of the device.
        namespace: root of all keys, with the pool's layout and dtype filled in.
        running: sequences that hold pages (LOADING, PREFILL, DECODE), in order of admission.
        waiting: sequences that hold none, as a heap.
        preemptions: times that a sequence had to give its pages up.
        prompt_tokens, prefix_hit_tokens: prompt tokens of sequences that began to compute, and those of them reused.
    """

    def __init__(
        self,
        config: EngineConfig,
        layout: KVLayout,
        *,
        max_model_len: int,
        eos_ids: frozenset[int] = frozenset(),
        namespace: Namespace | None = None,
        loader: KVLoader | None = None,
    ):
        self.allocator = PageAllocator(layout.num_pages, LRU(layout.num_pages))
        # KV that is reused bit for bit must have been computed in the same chunks.
        chunks = f", chunks of {config.token_budget}" if config.deterministic else ""
        layout_name = layout.fingerprint + chunks
        self.namespace = dataclasses.replace(namespace or Namespace(), layout=layout_name, dtype=layout.dtype)
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = 0
        self.prompt_tokens = 0
        self.prefix_hit_tokens = 0
        self._config = config
        self._layout = layout
        self._max_model_len = max_model_len
        self._eos_ids = eos_ids
        self._loader = loader
        self._by_id: dict[str, Sequence] = {}
        self._order = 0
        self._prefilled = False
        # KV is reused in runs of so many pages.
        self._reuse_pages = config.token_budget // layout.page_size if config.deterministic else 1

    def add(self, request: Request, emitted: Items[int] = ()) -> None:
        """Queues `request`, and hashes its keys if it has none. Raises `RequestRefusedError` if it can never be served.

        Keys that `request` has must be those of its full pages in `namespace` under its salt. `emitted` are tokens that
        the request has generated elsewhere.
        """
        if request.id in self._by_id:
            raise RequestRefusedError(f"request id {request.id!r} is already in the engine; choose another.")
        check_lengths(request, len(emitted), self._layout, self._max_model_len)
        page_size, root = self._layout.page_size, self.namespace.root(request.salt)
        sequence = Sequence(
            request,
            self._order,
            max_pages=self._layout.pages_for(self._max_model_len),
            page_size=page_size,
            eos_ids=self._eos_ids,
            root=root,
            keys=prompt_keys(request, page_size, root) if self._config.prefix_cache else [],
            emitted=emitted,
            chunk_tokens=self._config.token_budget if self._config.deterministic else None,
        )
        self._order += 1
        self._by_id[request.id] = sequence
        heapq.heappush(self.waiting, sequence)

    def abort(self, request_id: str) -> bool:
        """Drops a request in any phase; `False` if it is unknown or already finished.

        The pages of a LOADING sequence are freed by `loaded`, all others at once.
        """
        sequence = self._by_id.get(request_id)
        if sequence is None:
            return False
        self.finish(sequence)
        return True

    def finish(self, sequence: Sequence) -> None:
        """Removes `sequence`; its full pages stay cached."""
        del self._by_id[sequence.request.id]
        if sequence.phase is SequencePhase.WAITING:
            self.waiting.remove(sequence)
            heapq.heapify(self.waiting)
            return
        self.running.remove(sequence)
        if sequence.phase is not SequencePhase.LOADING:
            self.allocator.release(sequence.stop())

    def plan(self) -> StepPlan:
        """Chooses the next step's work and takes the pages that it needs."""
        if not self._config.deterministic:
            decodes = self._plan_decodes()
            return StepPlan(tuple(decodes), self._plan_prefills(self._config.token_budget - len(decodes)))
        # Steps of one kind, in turn, so that neither waits for more than one of the other.
        decodes = self._plan_decodes() if self._prefilled else []
        prefills = () if decodes else self._plan_prefills(self._config.token_budget)
        self._prefilled = bool(prefills)
        if not decodes and not prefills:
            decodes = self._plan_decodes()
        return StepPlan(tuple(decodes), prefills)

    def _plan_prefills(self, budget: int) -> tuple[tuple[Sequence, int], ...]:
        """Returns (sequence, tokens) of prompt chunks of at most `budget` tokens, and admits sequences for them."""
        prefills: list[tuple[Sequence, int]] = []
        unfinished = [sequence for sequence in self.running if sequence.phase is SequencePhase.PREFILL]
        while budget and len(prefills) < self._config.max_prefill_rows:
            sequence = unfinished.pop(0) if unfinished else self._admit()
            if sequence is None:
                break
            if sequence.phase is not SequencePhase.PREFILL:
                continue
            tokens = sequence.next_chunk(budget)
            if not tokens:
                break
            prefills.append((sequence, tokens))
            budget -= tokens
        return tuple(prefills)

    def computed(self, sequence: Sequence, tokens: int) -> None:
        """Records that KV of `tokens` more tokens is in the pool, and publishes pages that this filled."""
        sequence.advance(tokens)
        self._publish(sequence)

    def loaded(self, sequence: Sequence, computed_tokens: int) -> None:
        """Ends the load of a LOADING sequence, which the next plan computes from `computed_tokens` on.

        Args:
            sequence: as the loader got it.
            computed_tokens: leading tokens of the sequence whose KV is in its pages now, those included that were there
                before the load; a load that failed adds none.

        Raises:
            EngineError: the sequence is not LOADING, or the tokens are fewer than before the load or all that it has.
        """
        if sequence.phase is not SequencePhase.LOADING:
            raise EngineError(
                f"request {sequence.request.id!r} is in phase {sequence.phase.name}, not LOADING; end each load once."
            )
        if not sequence.computed <= computed_tokens < len(sequence.tokens):
            raise EngineError(
                f"{computed_tokens} tokens of request {sequence.request.id!r} cannot be loaded: {sequence.computed} of "
                f"{len(sequence.tokens)} were there before, and the last one is always computed."
            )
        sequence.start(computed_tokens)
        self._publish(sequence)
        if self._by_id.get(sequence.request.id) is sequence:
            self._count(sequence)
        else:  # aborted while LOADING
            self.allocator.release(sequence.stop())

    def _plan_decodes(self) -> list[Sequence]:
        """Returns the decoding sequences, each with a page for its next token, after preempting where there is none."""
        decode = SequencePhase.DECODE
        decodes: list[Sequence] = []
        for sequence in sorted(self.running):
            while (
                sequence.phase is decode and self._layout.pages_for(len(sequence.tokens)) > sequence.page_table.length
            ):
                if self.allocator.available:
                    sequence.page_table.extend(self.allocator.allocate(1).pages)
                else:
                    self._preempt(max(other for other in self.running if other.phase is not SequencePhase.LOADING))
            if sequence.phase is decode:
                decodes.append(sequence)
        return decodes

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.allocator.release(sequence.stop())
        sequence.preemptions += 1
        heapq.heappush(self.waiting, sequence)
        self.preemptions += 1
        _logger.debug("request %s preempted after %d tokens", sequence.request.id, sequence.generated)

    def _admit(self) -> Sequence | None:
        """Admits the first waiting sequence, as PREFILL or LOADING, if its pages and a place in the batch are there."""
        if not self.waiting or len(self.running) >= self._config.max_batch:
            return None
        sequence = self.waiting[0]
        keys = sequence.keys()[: sequence.reusable_pages] if self._config.prefix_cache else []
        cached = self.allocator.lookup(keys)
        cached = cached[: len(cached) // self._reuse_pages * self._reuse_pages]
        new = self._layout.pages_for(len(sequence.tokens)) - len(cached)
        # One page of growth for every running sequence: admitting must not cause the very next preemption.
        if new + len(self.running) > self.allocator.available - self.allocator.unreferenced(cached):
            return None
        heapq.heappop(self.waiting)
        self.allocator.acquire(cached)
        pages = self.allocator.allocate(new).pages
        sequence.take_pages(cached, pages)
        self.running.append(sequence)
        _logger.debug(
            "request %s admitted: %d of %d tokens cached",
            sequence.request.id,
            sequence.computed,
            len(sequence.tokens),
        )
        unit = self._reuse_pages
        loadable = self._loader.lookup(keys[len(cached) :]) // unit * unit if self._loader else 0
        if self._loader and loadable:
            sequence.load()
            self._loader.load(sequence, keys[len(cached) :][:loadable], pages[:loadable])
        else:
            sequence.start(sequence.computed)
            self._count(sequence)
        return sequence

    def _count(self, sequence: Sequence) -> None:
        if not sequence.preemptions:
            self.prompt_tokens += len(sequence.request.prompt)
            self.prefix_hit_tokens += sequence.cached_tokens

    def _publish(self, sequence: Sequence) -> None:
        if self._config.prefix_cache:
            for page, key in sequence.unpublished():
                self.allocator.publish(page, key)
