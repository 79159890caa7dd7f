"""The engine: continuous batching over one paged model. Synchronous, single-threaded, and without a clock.

Life of a request: `add` checks and queues the request. Each `step` computes one token of every decoding sequence and a
chunk of the prompts behind them (in a deterministic engine, one or the other). The step that computes a prompt's last
token yields the request's first `TokenEvent`, and each later step yields one more, until a stop token or the length
limit ends the request. `abort` drops a request between any two steps. `generate` does all of that for a list of
prompts.

The engine logs to `serving.engine`: warm-up at INFO, refusals at WARNING, and what becomes of each request at DEBUG.
"""

import concurrent.futures
import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

import jax
import numpy as np

from kvcache.blocks import Namespace
from model.sampling_params import SamplingParams, SamplingParamsError
from serving.engine.batch import step_inputs
from serving.engine.buckets import bucket_of, buckets, rows_of
from serving.engine.compiles import compiles
from serving.engine.errors import EngineError, RequestRefusedError
from serving.engine.runner import StepRunner
from serving.engine.sampler import Sampled, Sampler
from serving.engine.scheduler import Scheduler, StepPlan
from serving.engine.sequence import Sequence
from serving.engine.types import EngineConfig, EngineStats, Generation, TokenEvent
from serving.request import Request

_logger = logging.getLogger(__name__)

WarmUpProgress = Callable[[int, int], None]

# Most steps compiled at once: on a GPU each compilation tries matmuls, and needs memory beside weights and pool.
_COMPILERS = 4


class Engine:
    """Serves one model: queues and batches requests, and has `runner` compute the steps.

    Args:
        runner: owns weights and KV pool.
        config: sizes of a step and of the batch; those of the pool are the runner's.
        eos_ids: token ids that end a sequence.
        namespace: what the keys of KV stand for; layout and dtype are the runner's. `None` leaves model, revision and
            tokenizer without a name, which is enough while KV stays in this engine.

    Raises:
        EngineError: `config.max_model_len` is more than the model takes.
    """

    def __init__(
        self,
        runner: StepRunner,
        config: EngineConfig,
        *,
        eos_ids: Iterable[int] = (),
        namespace: Namespace | None = None,
    ):
        longest = runner.config.max_position_embeddings
        self.max_model_len = config.max_model_len or longest
        if self.max_model_len > longest:
            raise EngineError(
                f"`max_model_len` is {self.max_model_len}, and the model takes {longest} tokens (its "
                "`max_position_embeddings`, with RoPE scaling); lower it, or scale RoPE in the model's config."
            )
        self._runner = runner
        eos = frozenset(eos_ids)
        self._vocab_size = runner.config.vocab_size
        self._sampler = Sampler(self._vocab_size, eos)
        self._scheduler = Scheduler(
            config, runner.layout, max_model_len=self.max_model_len, eos_ids=eos, namespace=namespace
        )
        self._seed, self._deterministic = config.seed, config.deterministic
        self._seeds = np.random.default_rng(config.seed)
        self._buckets = buckets(config)
        self._max_pages = runner.layout.pages_for(self.max_model_len)
        self._generate_calls = 0
        self._steps = 0
        self._generated = 0
        self._compiles = compiles()

    @property
    def namespace(self) -> Namespace:
        """What the keys of KV stand for: a request may bring keys that were hashed under its root."""
        return self._scheduler.namespace

    @property
    def has_work(self) -> bool:
        """Whether any request is waiting or running, so that `step` has something to do."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def add(self, request: Request, emitted: Items[int] = ()) -> None:
        """Queues `request`; one that samples without a seed gets the next of the engine's.

        Args:
            request: what to generate.
            emitted: tokens that the request generated before its KV was lost. Generation goes on behind these tokens,
                which are not emitted again; in a deterministic engine with the very bits that would have come without
                the loss. A request that samples needs the seed that it had.

        Raises:
            RequestRefusedError: this engine can never serve the request; nothing is queued.
            SamplingParamsError: a token id of `request.sampling` is outside the vocabulary; nothing is queued.
        """
        request.sampling.check_vocabulary(self._vocab_size)
        try:
            if outside := [token for token in (*request.prompt, *emitted) if not 0 <= token < self._vocab_size]:
                raise RequestRefusedError(
                    f"prompt token {outside[0]} is outside the vocabulary of {self._vocab_size}; "
                    "encode with the model's own tokenizer."
                )
            if emitted and request.sampling.seed is None and not request.sampling.greedy:
                raise RequestRefusedError("a request that samples can be resumed only with the seed that it had.")
            sampling = request.sampling.with_seed(self._next_seed(request))
            self._scheduler.add(dataclasses.replace(request, sampling=sampling), emitted)
        except RequestRefusedError as error:
            _logger.warning("request %s refused: %s", request.id, error)
            raise

    def abort(self, request_id: str) -> bool:
        """Drops a request and frees its pages; `False` if it is unknown or already finished."""
        known = self._scheduler.abort(request_id)
        if known:
            _logger.debug("request %s aborted", request_id)
        return known

    def generate(
        self, prompts: Items[Items[int]], sampling: SamplingParams | Items[SamplingParams]
    ) -> list[Generation]:
        """Serves `prompts` to their ends and returns what each generated, in their order.

        Args:
            prompts: token ids of each request.
            sampling: of all prompts, or one for each.

        Raises:
            EngineError: other requests are open, or there is not one `sampling` for each prompt.
            RequestRefusedError: a prompt or its sampling that this engine can never serve, named by its index; none is
                served.
        """
        if self.has_work:
            raise EngineError(
                "`generate` needs an engine without open requests; finish them with `step` or `abort` them."
            )
        samplings = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        if len(samplings) != len(prompts):
            raise EngineError(
                f"{len(prompts)} prompts and {len(samplings)} `sampling`s; give one for all, or one each."
            )
        self._generate_calls += 1
        events: dict[str, list[TokenEvent]] = {}
        for index, (prompt, params) in enumerate(zip(prompts, samplings, strict=True)):
            request = Request(id=f"generate-{self._generate_calls}-{index}", prompt=tuple(prompt), sampling=params)
            try:
                self.add(request)
            except (RequestRefusedError, SamplingParamsError) as error:
                for request_id in events:
                    self.abort(request_id)
                raise RequestRefusedError(f"prompts[{index}]: {error}") from error
            events[request.id] = []
        while self.has_work:
            for event in self.step():
                events[event.request_id].append(event)
        return [Generation.of(request_events) for request_events in events.values()]

    def warm_up(self, progress: WarmUpProgress | None = None) -> None:
        """Compiles every shape that a step can have, so that none is compiled while serving.

        Args:
            progress: called with (shapes done, shapes in all) after each shape.
        """
        empty = StepPlan((), ())
        inputs = [step_inputs(empty, bucket, self._runner.layout, self._max_pages) for bucket in self._buckets]
        with concurrent.futures.ThreadPoolExecutor(_COMPILERS) as pool:
            steps = zip(inputs, self._buckets, strict=True)
            compiling = [pool.submit(self._runner.compile, *step) for step in steps]
            for index, bucket in enumerate(self._buckets):
                compiling[index].result()
                self._sampler.warm_up(self._runner.forward(inputs[index], bucket))
                if progress:
                    progress(index + 1, len(self._buckets))
        _logger.info("warm-up: %d step shapes, %d compilations", len(self._buckets), compiles() - self._compiles)
        self._compiles = compiles()

    def step(self) -> list[TokenEvent]:
        """Computes one step and returns the tokens that the step generated; empty when there is nothing to do."""
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
            # Nothing reads the logits. Wait for them all the same: otherwise all chunks of a long prompt would be
            # dispatched at once, and a request that arrives meanwhile would wait for the last chunk.
            jax.block_until_ready(logits)
        for _, sequence, count in rows:
            self._scheduler.computed(sequence, count)
        return [self._emit(sequence, sampled[row]) for row, sequence in choosing.items()]

    def stats(self) -> EngineStats:
        """Returns the gauges as they stand, and the counters since the engine was made."""
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

    def _next_seed(self, request: Request) -> int:
        """Returns the engine's next seed; in a deterministic engine, where order is chance, one by request id."""
        if not self._deterministic:
            return int(self._seeds.integers(2**63))
        named = hashlib.sha256(f"{self._seed}:{request.id}".encode()).digest()
        return int.from_bytes(named[:8], "little") >> 1

    def _emit(self, sequence: Sequence, sampled: Sampled) -> TokenEvent:
        """Appends a chosen token to its sequence, and finishes the sequence where the token ends it."""
        sequence.tokens.append(sampled.token)
        self._generated += 1
        reason = None
        if sampled.token in sequence.stop_ids and sequence.generated >= sequence.request.sampling.min_tokens:
            reason = "stop"
        elif sequence.generated >= sequence.request.sampling.max_tokens:
            reason = "length"
        if reason:
            self._scheduler.finish(sequence)
            _logger.debug("request %s finished: %s after %d tokens", sequence.request.id, reason, sequence.generated)
        return TokenEvent(
            request_id=sequence.request.id,
            token=sampled.token,
            logprob=sampled.logprob,
            top_logprobs=sampled.top_logprobs,
            finish_reason=reason,
            cached_tokens=sequence.cached_tokens,
        )
