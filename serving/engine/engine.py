"""The engine: continuous batching over one paged model. Synchronous, single-threaded, and without a clock.

Life of a request: `add` checks and queues it; each `step` computes one token of every decoding sequence and a chunk
of the prompts behind them; the step that computes a prompt's last token yields the first `TokenEvent`, later steps
one each, until a stop token or the length limit ends it. `abort` drops it between any two steps.
"""

import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh

from model.config import ModelConfig
from model.transformer import Transformer
from serving.engine.batch import step_inputs
from serving.engine.buckets import bucket_of, buckets, rows_of
from serving.engine.compiles import compiles
from serving.engine.errors import RequestRefusedError
from serving.engine.runner import ModelRunner
from serving.engine.sampler import Sampled, Sampler
from serving.engine.scheduler import Scheduler, StepPlan
from serving.engine.sequence import Sequence
from serving.engine.types import EngineConfig, EngineStats, TokenEvent
from serving.request import Request

Progress = Callable[[int, int], None]

# At most so many steps are compiled at once: on a GPU each tries matmuls of its own, beside weights and a full pool.
_COMPILERS = 4


class Engine:
    """Serves one model on one mesh."""

    def __init__(
        self,
        config: ModelConfig,
        model: Transformer,
        engine: EngineConfig | None = None,
        *,
        mesh: Mesh | None = None,
        eos_ids: Iterable[int] = (),
    ):
        engine = engine or EngineConfig()
        self.max_model_len = min(engine.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        self._runner = ModelRunner(config, model, engine, mesh)
        eos = frozenset(eos_ids)
        self._sampler = Sampler(config.vocab_size, eos)
        self._scheduler = Scheduler(engine, self._runner.layout, self.max_model_len, eos)
        self._vocab_size = config.vocab_size
        self._seeds = np.random.default_rng(engine.seed)
        self._buckets = buckets(engine)
        self._max_pages = self._runner.layout.pages_for(self.max_model_len)
        self._steps = 0
        self._generated = 0
        self._compiles = compiles()

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def add(self, request: Request) -> None:
        """Queues `request`; one that samples without a seed gets the next of the engine's.

        Raises `RequestRefusedError` if this engine can never serve it; nothing is queued then.
        """
        request.sampling.check_vocabulary(self._vocab_size)
        if outside := [token for token in request.prompt if not 0 <= token < self._vocab_size]:
            raise RequestRefusedError(
                f"prompt token {outside[0]} is outside the vocabulary of {self._vocab_size}; "
                "encode with the model's own tokenizer."
            )
        seed = int(self._seeds.integers(2**63))
        self._scheduler.add(dataclasses.replace(request, sampling=request.sampling.with_seed(seed)))

    def abort(self, request_id: str) -> bool:
        """Drops a request and frees its pages; `False` if it is unknown or already finished."""
        return self._scheduler.abort(request_id)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Compiles every shape that a step can have, so that none is compiled while serving.

        `progress(done, total)` is called after each.
        """
        empty = StepPlan((), ())
        inputs = [step_inputs(empty, bucket, self._runner.layout, self._max_pages) for bucket in self._buckets]
        with concurrent.futures.ThreadPoolExecutor(_COMPILERS) as pool:
            # Traced one after the other, as Python is, and compiled side by side: XLA lets go of the interpreter.
            lowered = (self._runner.lower(*args) for args in zip(inputs, self._buckets, strict=True))
            compiling = [pool.submit(step.compile) for step in lowered]
            for index, bucket in enumerate(self._buckets):
                compiling[index].result()
                self._sampler.warm_up(self._runner.forward(inputs[index], bucket))
                if progress:
                    progress(index + 1, len(self._buckets))
        self._compiles = compiles()

    def step(self) -> list[TokenEvent]:
        """Computes one step and returns the tokens that it generated; empty when there is nothing to do."""
        plan = self._scheduler.plan()
        if not plan:
            return []
        self._steps += 1
        bucket = bucket_of(plan, self._buckets)
        rows = rows_of(plan, bucket)
        logits = self._runner.forward(step_inputs(plan, bucket, self._runner.layout, self._max_pages), bucket)
        choosing = {row: sequence for row, sequence, count in rows if sequence.pending == count}
        sampled = self._sampler(logits, choosing) if choosing else {}
        if not choosing:
            # Nothing read the logits: waited for all the same, or all chunks of a long prompt would be dispatched at
            # once and whoever arrives meanwhile would wait for the last of them.
            jax.block_until_ready(logits)
        for _, sequence, count in rows:
            self._scheduler.computed(sequence, count)
        return [self._emit(sequence, sampled[row]) for row, sequence in choosing.items()]

    def stats(self) -> EngineStats:
        """Gauges and counters."""
        scheduler, allocator = self._scheduler, self._scheduler.allocator
        return EngineStats(
            waiting=len(scheduler.waiting),
            running=len(scheduler.running),
            pages_total=allocator.num_pages,
            pages_used=allocator.referenced,
            pages_cached=allocator.cached,
            prompt_tokens=scheduler.prompt_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            generated_tokens=self._generated,
            preemptions=scheduler.preemptions,
            steps=self._steps,
            compiles_after_warm_up=compiles() - self._compiles,
        )

    def _emit(self, sequence: Sequence, sampled: Sampled) -> TokenEvent:
        sequence.tokens.append(sampled.token)
        self._generated += 1
        reason = None
        if sampled.token in sequence.stop_ids and sequence.generated >= sequence.request.sampling.min_tokens:
            reason = "stop"
        elif sequence.generated >= sequence.request.sampling.max_tokens:
            reason = "length"
        if reason:
            self._scheduler.finish(sequence)
        return TokenEvent(
            sequence.request.id,
            sampled.token,
            sampled.logprob,
            sampled.top_logprobs,
            reason,
            sequence.cached_tokens,
        )
