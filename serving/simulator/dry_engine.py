"""An engine without a model: the engine's own scheduler and pages, so that every step is planned as the engine would.

Nothing here is a copy of a policy. Whatever `serving.engine` decides about order, chunks, pages, preemption and reuse
is decided here by the same code; only the tokens are imaginary.
"""

import dataclasses

from kvcache.layout import KVLayout
from serving.engine.buckets import bucket_of, buckets
from serving.engine.scheduler import Scheduler, StepPlan
from serving.engine.sequence import Sequence
from serving.engine.types import EngineConfig
from serving.request import Request
from serving.simulator.steps import EngineModel, StepWork


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SequenceProgress:
    """One request after a run of steps: how many tokens came, whether they were its first and its last."""

    request_id: str
    tokens: int
    first: bool
    finished: bool
    cached_tokens: int


class DryEngine:
    """Plans steps (`plan`), and completes them (`complete`) as if a model had computed them.

    Attributes:
        shapes: every shape that a step can have.
    """

    def __init__(self, model: EngineModel) -> None:
        config = EngineConfig(
            page_size=model.page_size,
            num_pages=model.num_pages,
            max_batch=model.max_batch,
            token_budget=model.token_budget,
            max_prefill_rows=model.max_prefill_rows,
            max_model_len=model.max_model_len,
            prefix_cache=model.prefix_cache,
            deterministic=model.deterministic,
        )
        self._layout = KVLayout(
            num_layers=1, num_pages=model.num_pages, page_size=model.page_size, num_kv_heads=1, head_dim=1
        )
        self._scheduler = Scheduler(config, self._layout, max_model_len=model.max_model_len)
        self.shapes = buckets(config)
        self._plan = StepPlan((), ())

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    @property
    def preemptions(self) -> int:
        """Sequences that gave their pages up so far."""
        return self._scheduler.preemptions

    def add(self, request: Request) -> None:
        """Queues a request; raises what the engine raises."""
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Drops a request."""
        self._scheduler.abort(request_id)

    def plan(self) -> StepWork | None:
        """The next step, or `None` without work. Complete it before planning the next."""
        plan = self._plan = self._scheduler.plan()
        if not plan:
            return None
        bucket = bucket_of(plan, self.shapes)
        pieces = [(sequence.computed, sequence.computed + count) for sequence, count in plan.prefills]
        return StepWork(
            shape=(bucket.decode_rows, bucket.prefill_rows, bucket.prefill_tokens),
            decodes=len(plan.decodes),
            decode_tokens=sum(sequence.computed + 1 for sequence in plan.decodes),
            chunks=len(pieces),
            prefill_tokens=sum(end - begin for begin, end in pieces),
            prefill_pairs=sum(end * end - begin * begin for begin, end in pieces),
        )

    def steps_alike(self) -> int:
        """How many steps, this one included, differ in nothing but grown contexts, if no request comes or goes.

        Only decodes are alike; pages must suffice for all of those steps, for a preemption would change the batch.
        """
        plan = self._plan
        # The last token of a prompt may be computed as a decode is; the token that comes of it is a first one.
        if plan.prefills or not all(sequence.generated and sequence.pending == 1 for sequence in plan.decodes):
            return 1
        most = min(sequence.request.sampling.max_tokens - sequence.generated for sequence in plan.decodes)
        pages = sum(self._pages_to_grow(sequence, most) for sequence in plan.decodes)
        return most if pages <= self._scheduler.allocator.available else 1

    def complete(self, steps: int = 1) -> list[SequenceProgress]:
        """Completes the planned step and `steps - 1` more like it; what became of each request that got tokens."""
        # A sequence that computes tokens that it has emitted before generates none.
        chosen = [(sequence, steps, steps if sequence.pending == 1 else 0) for sequence in self._plan.decodes]
        for sequence, _, _ in chosen:
            if grow := self._pages_to_grow(sequence, steps):
                sequence.page_table.extend(self._scheduler.allocator.allocate(grow).pages)
        for sequence, count in self._plan.prefills:
            chosen.append((sequence, count, int(sequence.pending == count)))
        for sequence, computed, generated in chosen:
            # Its own number, so that what it generates is nobody else's prefix.
            sequence.tokens.extend([sequence.order] * generated)
            self._scheduler.computed(sequence, computed)
        return [self._progress(sequence, generated) for sequence, _, generated in chosen if generated]

    def _pages_to_grow(self, sequence: Sequence, steps: int) -> int:
        return self._layout.pages_for(sequence.computed + steps) - sequence.page_table.length

    def _progress(self, sequence: Sequence, tokens: int) -> SequenceProgress:
        finished = sequence.generated >= sequence.request.sampling.max_tokens
        if finished:
            self._scheduler.finish(sequence)
        first = sequence.generated == tokens
        return SequenceProgress(
            request_id=sequence.request.id,
            tokens=tokens,
            first=first,
            finished=finished,
            cached_tokens=sequence.cached_tokens,
        )
