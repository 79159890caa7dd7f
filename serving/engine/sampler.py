"""Chooses tokens: from logits on the device to token ids on the host, each row by its own request's parameters."""

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from jax import Array

from model.sampling import MAX_LOGPROBS, SamplingBatch, SamplingParams, TokenCounts, sample
from serving.engine.sequence import Sequence

_IDLE = SamplingParams(temperature=0.0)


@dataclasses.dataclass(frozen=True)
class Sampled:
    """One chosen token.

    Attributes:
        token: token id.
        logprob: log-probability of the token under the model; `None` unless the request asked for log-probabilities.
        top_logprobs: the most likely (token, log-probability) pairs, best first; as many as the request asked for.
    """

    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses a token for each row of a step.

    The parameters of the rows stay on the device from step to step, until a row changes its sequence.

    Args:
        vocab_size: columns of the logits.
        eos_ids: token ids that end a sequence; `min_tokens` holds these back.
    """

    def __init__(self, vocab_size: int, eos_ids: frozenset[int]):
        self._vocab_size = vocab_size
        self._eos_ids = tuple(sorted(eos_ids))
        self._top = min(MAX_LOGPROBS, vocab_size)
        self._key: tuple[int | tuple[int, int], ...] = ()
        self._batch: SamplingBatch | None = None

    def __call__(self, logits: Array, rows: Mapping[int, Sequence]) -> dict[int, Sampled]:
        """Returns the chosen token of each of `rows`, and waits for the device.

        Args:
            logits: float32 [R, V].
            rows: row of `logits` -> sequence whose next token the row chooses.
        """
        width = logits.shape[0]
        batch = self._batch_of(rows, width)
        generated = np.zeros(width, np.int32)
        for row, sequence in rows.items():
            generated[row] = sequence.generated
        params = [sequence.request.sampling for sequence in rows.values()]
        counts = self._counts(rows, width) if any(p.penalized for p in params) else None
        # Penalised rows share the compiled variant that has log-probabilities, so that there is one less to warm up.
        detailed = counts is not None or any(p.logprobs is not None for p in params)
        samples = jax.device_get(
            sample(logits, batch, generated, counts, num_top_logprobs=self._top if detailed else None)
        )
        result = {}
        for row, sequence in rows.items():
            wanted = sequence.request.sampling.logprobs
            if wanted is None:
                result[row] = Sampled(int(samples.tokens[row]))
            else:
                ids, values = samples.top_ids[row, :wanted].tolist(), samples.top_logprobs[row, :wanted].tolist()
                top = tuple(zip(ids, values, strict=True))
                result[row] = Sampled(int(samples.tokens[row]), float(samples.logprob[row]), top)
        return result

    def warm_up(self, logits: Array) -> None:
        """Compiles every variant for the shape of `logits` [R, V]: plain, with log-probabilities, with penalties."""
        width = logits.shape[0]
        batch = jax.device_put(SamplingBatch.from_params([], width, self._eos_ids))
        generated = np.zeros(width, np.int32)
        for counts, top in ((None, None), (None, self._top), (self._counts({}, width), self._top)):
            jax.block_until_ready(sample(logits, batch, generated, counts, num_top_logprobs=top))

    def _batch_of(self, rows: Mapping[int, Sequence], width: int) -> SamplingBatch:
        key = (width, *((row, sequence.order) for row, sequence in rows.items()))
        if self._batch is None or key != self._key:
            params = [rows[row].request.sampling if row in rows else _IDLE for row in range(width)]
            self._batch = jax.device_put(SamplingBatch.from_params(params, width, self._eos_ids))
            self._key = key
        return self._batch

    def _counts(self, rows: Mapping[int, Sequence], width: int) -> TokenCounts:
        prompts, outputs = [], []
        for row in range(width):
            tokens = rows[row].tokens if row in rows else []
            prompt = len(rows[row].request.prompt) if row in rows else 0
            prompts.append(tokens[:prompt])
            outputs.append(tokens[prompt:])
        return TokenCounts.from_tokens(prompts, outputs, width, self._vocab_size)
