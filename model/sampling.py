"""Batched sampling: every row of a batch follows its own request, in a jitted call without a sort.

Truncation needs thresholds, not an order: `_threshold` finds the exact k-th largest logit, or the exact edge of the
nucleus, in 32 passes over the vocabulary (one per bit of a float32). The draw inverts the cumulative distribution with
one uniform number per row. `python -m experiments.bench_sampling` times both beside a sort and Gumbel noise.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from model.sampling_params import MAX_LOGIT_BIAS as MAX_LOGIT_BIAS
from model.sampling_params import MAX_LOGPROBS as MAX_LOGPROBS
from model.sampling_params import MAX_STOP_TOKEN_IDS as MAX_STOP_TOKEN_IDS
from model.sampling_params import SamplingParams as SamplingParams
from model.sampling_params import SamplingParamsError as SamplingParamsError

Array = jax.Array | np.ndarray

# Stop ids of a request and of the model share one array; the model's own eos ids have this much room.
MAX_EOS_IDS = 8
_BLOCK = 256


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingBatch:
    """The parameters of R rows as arrays; it changes only when the rows of the batch do.

    Attributes:
        temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty: float32 [R].
        top_k: int32 [R], 0 = off.
        seed: uint32 [R, 2], the high and low half of each row's seed.
        bias_ids, bias: int32 and float32 [R, MAX_LOGIT_BIAS]; -1 = no entry.
        min_tokens: int32 [R]; `stop_ids` are impossible before so many tokens.
        stop_ids: int32 [R, MAX_STOP_TOKEN_IDS + MAX_EOS_IDS]; -1 = no entry.
    """

    temperature: Array
    top_k: Array
    top_p: Array
    min_p: Array
    repetition_penalty: Array
    frequency_penalty: Array
    presence_penalty: Array
    seed: Array
    bias_ids: Array
    bias: Array
    min_tokens: Array
    stop_ids: Array

    @classmethod
    def from_params(cls, params: Sequence[SamplingParams], width: int, eos_ids: Sequence[int] = ()) -> "SamplingBatch":
        """Rows of `params`, then greedy rows up to `width`. `eos_ids` are held back by `min_tokens` like stop ids.

        Raises ValueError where a row that samples has no seed, or where the rows or `eos_ids` do not fit.
        """
        if len(params) > width or len(eos_ids) > MAX_EOS_IDS:
            raise ValueError(
                f"{len(params)} rows and {len(eos_ids)} eos ids do not fit: at most {width} rows and {MAX_EOS_IDS} ids."
            )
        if unseeded := [row for row, p in enumerate(params) if p.seed is None and not p.greedy]:
            raise ValueError(f"Rows {unseeded} sample without a seed: choose one with `SamplingParams.with_seed`.")

        def column(name: str, idle: float, dtype: type) -> np.ndarray:
            return np.array([getattr(p, name) for p in params] + [idle] * (width - len(params)), dtype)

        seed = np.zeros((width, 2), np.uint32)
        bias_ids = np.full((width, MAX_LOGIT_BIAS), -1, np.int32)
        bias = np.zeros((width, MAX_LOGIT_BIAS), np.float32)
        stop_ids = np.full((width, MAX_STOP_TOKEN_IDS + MAX_EOS_IDS), -1, np.int32)
        for row, p in enumerate(params):
            seed[row] = divmod((p.seed or 0) % 2**64, 2**32)
            if p.logit_bias:
                bias_ids[row, : len(p.logit_bias)], bias[row, : len(p.logit_bias)] = zip(*p.logit_bias, strict=True)
            stops = (*p.stop_token_ids, *(() if p.ignore_eos else eos_ids))
            stop_ids[row, : len(stops)] = stops
        temperature = column("temperature", 0, np.float32)
        return cls(
            temperature=np.where([p.greedy for p in params] + [True] * (width - len(params)), 0, temperature),
            top_k=column("top_k", 0, np.int32),
            top_p=column("top_p", 1, np.float32),
            min_p=column("min_p", 0, np.float32),
            repetition_penalty=column("repetition_penalty", 1, np.float32),
            frequency_penalty=column("frequency_penalty", 0, np.float32),
            presence_penalty=column("presence_penalty", 0, np.float32),
            seed=seed,
            bias_ids=bias_ids,
            bias=bias,
            min_tokens=column("min_tokens", 0, np.int32),
            stop_ids=stop_ids,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """How often each row has seen each token: what the penalties look at.

    Attributes:
        prompt: bool [R, V], whether the token is in the prompt.
        output: int32 [R, V], how often it was generated.
    """

    prompt: Array
    output: Array

    @classmethod
    def from_tokens(
        cls, prompts: Sequence[Sequence[int]], outputs: Sequence[Sequence[int]], width: int, vocab_size: int
    ) -> "TokenCounts":
        """Counts of the rows' prompt and generated token ids, then empty rows up to `width`."""
        prompt = np.zeros((width, vocab_size), bool)
        output = np.zeros((width, vocab_size), np.int32)
        for row, (prompt_tokens, output_tokens) in enumerate(zip(prompts, outputs, strict=True)):
            prompt[row, np.asarray(prompt_tokens, np.intp)] = True
            np.add.at(output[row], np.asarray(output_tokens, np.intp), 1)
        return cls(prompt, output)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """One token per row, and how likely the model found it.

    Attributes:
        tokens: int32 [R].
        logprob: float32 [R], of the token; None unless asked for.
        top_ids, top_logprobs: int32 and float32 [R, K], the most likely tokens, best first; None unless asked for.
    """

    tokens: jax.Array
    logprob: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def greedy(logits: jax.Array) -> jax.Array:
    """The most likely token of each row, the lowest id of equals: [R, V] -> int32 [R].

    XLA's CPU argmax is a scalar loop, 40 times slower than to take the maximum of blocks and to look into the best.
    """
    blocks = _blocks(logits, -jnp.inf)
    best = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1)
    place = jnp.argmax(_inside(blocks, best), axis=-1)
    return (best * _BLOCK + place).astype(jnp.int32)


def sample(
    logits: jax.Array,
    batch: SamplingBatch,
    generated: Array,
    counts: TokenCounts | None = None,
    *,
    num_top_logprobs: int | None = None,
) -> Samples:
    """Chooses the next token of every row by the row's own parameters.

    A row's draw depends on its logits, its parameters, its seed and its position alone: the random key is
    `fold_in(key(seed), generated)`, so batch mates and restarts change nothing.

    Args:
        logits: float32 [R, V].
        batch: parameters of the R rows.
        generated: int32 [R], tokens that each row has generated so far.
        counts: what the penalties need; may be None where no row is `penalized`.
        num_top_logprobs: alternatives reported per row (static); None reports no log-probability at all.
    """
    tokens = _choose(logits, batch, generated, counts)
    return Samples(tokens) if num_top_logprobs is None else _with_logprobs(logits, tokens, num_top_logprobs)


# Apart from `_with_logprobs`: choosing takes seconds to compile, and would once more for rows that want to know more.
@jax.jit
def _choose(logits: jax.Array, batch: SamplingBatch, generated: Array, counts: TokenCounts | None) -> jax.Array:
    held_back = jnp.where((jnp.asarray(generated) < batch.min_tokens)[:, None], batch.stop_ids, -1)
    edited = jnp.any(batch.bias_ids >= 0) | jnp.any(held_back >= 0)
    sampled = batch.temperature > 0

    def choose() -> jax.Array:
        edit = functools.partial(_edit, batch=batch, held_back=held_back)
        adjusted = lax.cond(edited, edit, lambda x: x, logits)
        adjusted = adjusted if counts is None else _penalize(adjusted, batch, counts)
        drawn = lax.cond(jnp.any(sampled), lambda: _draw(adjusted, batch, generated), lambda: jnp.zeros_like(generated))
        return jnp.where(sampled, drawn, greedy(adjusted))

    # Where every row is plainly greedy the logits are read once and never copied.
    plain = jnp.bool_(counts is None) & ~edited & ~jnp.any(sampled)
    return lax.cond(plain, lambda: greedy(logits), choose)


@functools.partial(jax.jit, static_argnames=("count",))
def _with_logprobs(logits: jax.Array, tokens: jax.Array, count: int) -> Samples:
    total = jax.nn.logsumexp(logits, axis=-1)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
    top_logits, top_ids = lax.top_k(logits, count)
    return Samples(tokens, chosen - total, top_ids, top_logits - total[:, None])


def _edit(logits: jax.Array, batch: SamplingBatch, held_back: jax.Array) -> jax.Array:
    """Logits with the biases added and the token ids that are `held_back` [R, S] impossible."""
    rows, vocab_size = jnp.arange(logits.shape[0])[:, None], logits.shape[1]
    # An absent entry points past the vocabulary and is dropped; -1 would be the last token.
    bias_ids, stop_ids = (jnp.where(ids < 0, vocab_size, ids) for ids in (batch.bias_ids, held_back))
    return logits.at[rows, bias_ids].add(batch.bias, mode="drop").at[rows, stop_ids].set(-jnp.inf, mode="drop")


def _penalize(logits: jax.Array, batch: SamplingBatch, counts: TokenCounts) -> jax.Array:
    seen = counts.prompt | (counts.output > 0)
    repetition = batch.repetition_penalty[:, None]
    logits = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits -= batch.frequency_penalty[:, None] * counts.output.astype(logits.dtype)
    return logits - batch.presence_penalty[:, None] * (counts.output > 0).astype(logits.dtype)


def _draw(logits: jax.Array, batch: SamplingBatch, generated: Array) -> jax.Array:
    """One token per row from the tempered and truncated distribution: [R, V] -> int32 [R]."""
    temperature = jnp.where(batch.temperature > 0, batch.temperature, 1)[:, None]
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature
    # The most likely token stands at 0, so a share of its probability is a bound on the scaled logit.
    scaled = jnp.where(scaled >= jnp.log(batch.min_p)[:, None], scaled, -jnp.inf)
    scaled = lax.cond(jnp.any(batch.top_k > 0), lambda x: _keep_top_k(x, batch.top_k), lambda x: x, scaled)
    weights = jnp.exp(scaled)
    weights = lax.cond(jnp.any(batch.top_p < 1), lambda w: _keep_top_p(w, batch.top_p), lambda w: w, weights)
    keys = jax.random.wrap_key_data(jnp.asarray(batch.seed), impl="threefry2x32")
    uniform = jax.vmap(lambda key, n: jax.random.uniform(jax.random.fold_in(key, n)))(keys, jnp.asarray(generated))
    return _invert_cdf(weights, uniform)


def _keep_top_k(logits: jax.Array, top_k: Array) -> jax.Array:
    count = jnp.where(top_k > 0, top_k, logits.shape[1])
    order = _ordered(logits)
    return jnp.where(order >= _threshold(order, jnp.ones(order.shape, jnp.int32), count)[:, None], logits, -jnp.inf)


def _keep_top_p(weights: jax.Array, top_p: Array) -> jax.Array:
    order = _ordered(weights)
    edge = _threshold(order, weights, top_p * jnp.sum(weights, axis=-1))
    return jnp.where((order >= edge[:, None]) | (top_p >= 1)[:, None], weights, 0)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 that compares the same way."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(order: jax.Array, weights: jax.Array, target: Array) -> jax.Array:
    """The largest uint32 [R] such that the weights at or above it still sum to `target`; equals stay together.

    Args:
        order: uint32 [R, V].
        weights: [R, V], none negative.
        target: [R].
    """

    def try_bit(bit: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (31 - bit).astype(jnp.uint32))
        reached = jnp.sum(jnp.where(order >= candidate[:, None], weights, 0), axis=-1)
        return jnp.where(reached >= target, candidate, threshold)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(order.shape[0], jnp.uint32))


def _invert_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """The token at which the cumulative weight passes `uniform` of the total: first its block, then its place there.

    Args:
        weights: float32 [R, V], none negative, some positive in every row.
        uniform: float32 [R] in [0, 1).
    """
    blocks = _blocks(weights, 0)
    mass = jnp.sum(blocks, axis=-1)
    cumulative = jnp.cumsum(mass, axis=-1)
    target = uniform * cumulative[:, -1]
    block = _first_above(cumulative, mass, target)
    before = jnp.take_along_axis(cumulative - mass, block[:, None], axis=1)[:, 0]
    inside = _inside(blocks, block)
    place = _first_above(jnp.cumsum(inside, axis=-1), inside, target - before)
    return block * _BLOCK + place


def _blocks(x: jax.Array, fill: float) -> jax.Array:
    """The vocabulary in blocks: [R, V] -> [R, B, _BLOCK], the last one filled up."""
    padding = ((0, 0), (0, -x.shape[1] % _BLOCK))
    return jnp.pad(x, padding, constant_values=fill).reshape(x.shape[0], -1, _BLOCK)


def _inside(blocks: jax.Array, index: jax.Array) -> jax.Array:
    """One block of each row: [R, B, _BLOCK] at int [R] -> [R, _BLOCK]."""
    return jnp.take_along_axis(blocks, index[:, None, None], axis=1)[:, 0]


def _first_above(cumulative: jax.Array, weights: jax.Array, target: Array) -> jax.Array:
    """First positive weight whose cumulative weight exceeds the target; the heaviest where rounding leaves none."""
    above = (cumulative > target[:, None]) & (weights > 0)
    index = jnp.where(jnp.any(above, axis=-1), jnp.argmax(above, axis=-1), jnp.argmax(weights, axis=-1))
    return index.astype(jnp.int32)
