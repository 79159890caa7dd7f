"""Sampling against an obvious NumPy reading of the same rules, and against the distribution it must follow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from model import sampling
from model.sampling import (
    SamplingBatch,
    SamplingParams,
    SamplingParamsError,
    TokenCounts,
    greedy,
    sample,
)
from model.sharding import parse_mesh

VOCAB = 50


def expected_distribution(logits, params, prompt, output, eos_ids=()):
    """The distribution of one row, float64 [V], by sorting and plain loops."""
    x = np.asarray(logits, np.float64).copy()
    for token, bias in params.logit_bias:
        x[token] += bias
    if len(output) < params.min_tokens:
        x[list(params.stop_token_ids) + ([] if params.ignore_eos else list(eos_ids))] = -np.inf
    for token in set(prompt) | set(output):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    if params.greedy:
        return np.eye(len(x))[np.argmax(x)]
    p = np.exp((x - x.max()) / params.temperature)
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p, kind="stable")
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    if params.top_p < 1:
        p[order[before >= params.top_p]] = 0
    return p / p.sum()


def draws(logits, params, count, prompt=(), output=(), eos_ids=()):
    """Frequencies of `count` independent draws of one row, each with its own seed."""
    rows = [dataclasses.replace(params, seed=seed) for seed in range(count)]
    batch = SamplingBatch.from_params(rows, count, eos_ids)
    counts = TokenCounts.from_tokens([prompt] * count, [output] * count, count, VOCAB) if params.penalized else None
    tokens = sample(jnp.tile(logits, (count, 1)), batch, np.full(count, len(output), np.int32), counts).tokens
    return np.bincount(tokens, minlength=VOCAB) / count


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.5),
        SamplingParams(temperature=1.7, top_k=7),
        SamplingParams(top_p=0.6),
        SamplingParams(min_p=0.1),
        SamplingParams(top_k=20, top_p=0.8, min_p=0.02, temperature=1.3),
        SamplingParams(logit_bias=((3, 2.5), (4, -100.0), (49, 1.0))),
        SamplingParams(repetition_penalty=1.5, frequency_penalty=0.7, presence_penalty=0.4),
        SamplingParams(min_tokens=5, max_tokens=9, stop_token_ids=(0, 11)),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, repetition_penalty=3.0),
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params, rng):
    """Chi-square over 8192 seeded draws; impossible tokens never appear. 4.5 standard deviations, seeds fixed."""
    logits = rng.normal(0, 1.5, VOCAB).astype(np.float32)
    prompt, output, eos_ids = (1, 2, 2, 30), (2, 5, 5, 5), (7,)
    expected = expected_distribution(logits, params, prompt, output, eos_ids)
    frequencies = draws(logits, params, 8192, prompt, output, eos_ids)
    assert frequencies[expected == 0].sum() == 0
    likely = expected > 0
    statistic = 8192 * ((frequencies[likely] - expected[likely]) ** 2 / expected[likely]).sum()
    freedom = likely.sum() - 1
    assert statistic <= freedom + 4.5 * np.sqrt(2 * freedom)


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, VOCAB),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.sampled_from([0.1, 0.7, 1.0, 2.0]),
)
def test_a_draw_is_always_possible(seed, top_k, top_p, min_p, temperature):
    logits = np.random.default_rng(seed).normal(0, 2, (4, VOCAB)).astype(np.float32)
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    tokens = np.asarray(sample(logits, SamplingBatch.from_params([params] * 4, 4), np.arange(4)).tokens)
    for row in range(4):
        # A nucleus edge within float32 rounding of `top_p` may fall either way.
        looser = dataclasses.replace(params, top_p=min(1.0, top_p + 1e-5), min_p=max(0.0, min_p - 1e-5))
        assert expected_distribution(logits[row], looser, (), ())[tokens[row]] > 0


def test_a_wide_vocabulary_is_drawn_from_evenly():
    """Blocks of the cumulative distribution, the padded last one included, get their share."""
    rows, vocab = 4096, 700
    batch = SamplingBatch.from_params([SamplingParams(seed=seed) for seed in range(rows)], rows)
    tokens = np.asarray(sample(jnp.zeros((rows, vocab)), batch, np.zeros(rows, np.int32)).tokens)
    frequencies = np.bincount(tokens // 100, minlength=7) / rows
    assert tokens.max() < vocab
    assert np.abs(frequencies - 1 / 7).max() < 4.5 * np.sqrt(1 / 7 / rows)


MIXED = [
    SamplingParams(temperature=0),
    SamplingParams(seed=1),
    SamplingParams(seed=2**40 + 1, top_k=5),
    SamplingParams(seed=-3, top_p=0.5, logprobs=3),
    SamplingParams(seed=4, min_p=0.2, logit_bias=((0, 50.0),)),
    SamplingParams(seed=5, repetition_penalty=1.3, presence_penalty=1.0),
    SamplingParams(seed=6, min_tokens=3, stop_token_ids=(1, 2)),
]


def test_tokens_do_not_depend_on_batch_mates(rng):
    logits = rng.normal(0, 2, (len(MIXED), VOCAB)).astype(np.float32)
    generated = np.arange(len(MIXED), dtype=np.int32)
    outputs = [list(rng.integers(0, VOCAB, n)) for n in generated]
    counts = TokenCounts.from_tokens([[1, 2]] * len(MIXED), outputs, 8, VOCAB)
    padded = np.concatenate([logits, np.zeros((1, VOCAB), np.float32)])
    together = sample(padded, SamplingBatch.from_params(MIXED, 8), np.append(generated, 0), counts).tokens
    for row, params in enumerate(MIXED):
        alone_counts = TokenCounts.from_tokens([[1, 2]], [outputs[row]], 1, VOCAB) if params.penalized else None
        batch = SamplingBatch.from_params([params], 1)
        alone = sample(logits[row : row + 1], batch, generated[row : row + 1], alone_counts).tokens
        assert alone[0] == together[row], params


def test_a_vocabulary_split_over_devices_gives_the_same_tokens(rng):
    logits = rng.normal(0, 2, (len(MIXED), 64)).astype(np.float32)
    split = jax.device_put(logits, NamedSharding(parse_mesh("tp:4"), PartitionSpec(None, "tp")))
    batch = SamplingBatch.from_params(MIXED, len(MIXED))
    counts = TokenCounts.from_tokens([[1, 2]] * len(MIXED), [[3]] * len(MIXED), len(MIXED), 64)
    generated = np.ones(len(MIXED), np.int32)
    np.testing.assert_array_equal(
        sample(split, batch, generated, counts).tokens, sample(logits, batch, generated, counts).tokens
    )


def test_the_same_seed_draws_the_same_and_another_differs(rng):
    logits = jnp.zeros((1, VOCAB))

    def stream(seed):
        batch = SamplingBatch.from_params([SamplingParams(seed=seed)], 1)
        return [int(sample(logits, batch, np.array([n], np.int32)).tokens[0]) for n in range(20)]

    assert stream(7) == stream(7)
    assert len({tuple(stream(seed)) for seed in (7, 8, 7 + 2**32, -7)}) == 4


def test_logprobs_are_the_models_own(rng):
    logits = rng.normal(0, 2, (2, VOCAB)).astype(np.float32)
    params = SamplingParams(seed=3, temperature=0.1, logit_bias=((9, 100.0),), logprobs=4)
    samples = sample(logits, SamplingBatch.from_params([params], 2), np.zeros(2, np.int32), num_top_logprobs=4)
    reference = np.asarray(jax.nn.log_softmax(logits))
    assert samples.tokens[0] == 9
    np.testing.assert_allclose(samples.logprob, reference[np.arange(2), samples.tokens], atol=2e-6)
    np.testing.assert_array_equal(samples.top_ids, np.argsort(-reference, axis=1)[:, :4])
    np.testing.assert_allclose(samples.top_logprobs, -np.sort(-reference, axis=1)[:, :4], atol=2e-6)


def test_logprobs_cost_nothing_unless_asked():
    samples = sample(jnp.zeros((1, VOCAB)), SamplingBatch.from_params([], 1), np.zeros(1, np.int32))
    assert samples.logprob is samples.top_ids is samples.top_logprobs is None


@pytest.mark.parametrize("vocab_size", [1, 4, 127, 128, 300, 1024])
def test_greedy_takes_the_first_of_equals(rng: np.random.Generator, vocab_size: int):
    """Few different values, so that equals stand in one block of the vocabulary and in several."""
    logits = rng.integers(-3, 0, (20, vocab_size)).astype(np.float32)
    logits[0] = -np.inf
    np.testing.assert_array_equal(jax.jit(greedy)(logits), np.argmax(logits, axis=-1))


def test_nothing_sorts_the_vocabulary():
    arguments = (jnp.zeros((2, VOCAB)), SamplingBatch.from_params(MIXED[:2], 2), np.zeros(2, np.int32))
    assert " sort(" not in jax.jit(sample).lower(*arguments).compile().as_text()


def test_no_recompilation_when_requests_change():
    before = sampling._choose._cache_size()
    for params in MIXED:
        batch = SamplingBatch.from_params([params], 3)
        sample(jnp.zeros((3, VOCAB)), batch, np.zeros(3, np.int32), TokenCounts.from_tokens([], [], 3, VOCAB))
    assert sampling._choose._cache_size() == before + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": -0.1}, "`temperature` is -0.1: use a number from 0 (greedy) to 100."),
        ({"temperature": float("nan")}, "`temperature` is nan"),
        ({"temperature": 1e39}, "`temperature` is 1e+39"),
        ({"temperature": 10**400}, "`temperature` is 1000000"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"top_k": 2**31}, "`top_k` is 2147483648: use a number of tokens up to 2147483647, or 0 for all."),
        ({"top_k": True}, "`top_k` is True"),
        ({"top_p": 0}, "`top_p` is 0: use a probability from 1e-30 to 1."),
        ({"top_p": 1e-39}, "`top_p` is 1e-39"),
        ({"min_p": 1.5}, "`min_p` is 1.5"),
        ({"repetition_penalty": 0}, "`repetition_penalty` is 0: use a number from 0.001 to 1000; 1 is off."),
        ({"repetition_penalty": 1e-30}, "`repetition_penalty` is 1e-30"),
        ({"repetition_penalty": 1e39}, "`repetition_penalty` is 1e+39"),
        ({"frequency_penalty": 2.1}, "`frequency_penalty` is 2.1: use a number from -2 to 2; 0 is off."),
        ({"presence_penalty": -3}, "`presence_penalty` is -3"),
        ({"logit_bias": ((1, 101),)}, "`logit_bias` is (1, 101): use pairs of a token id"),
        ({"logit_bias": ((1, 1), (1, 2))}, "name every token once"),
        ({"logit_bias": tuple((i, 1) for i in range(301))}, "`logit_bias` is '301 tokens': use at most 300 tokens."),
        ({"logit_bias": ((2**31, 1),)}, "`logit_bias` is (2147483648, 1)"),
        ({"seed": 2**64}, "`seed` is 18446744073709551616: use a 64-bit integer"),
        ({"logprobs": 21}, "`logprobs` is 21: use a number of alternatives from 0 to 20"),
        ({"stop": ("",)}, "every stop string needs at least one character"),
        ({"stop_token_ids": (-1,)}, "`stop_token_ids` is (-1,)"),
        ({"stop_token_ids": (2**31,)}, "`stop_token_ids` is (2147483648,)"),
        ({"stop_token_ids": (5,) * 10**6}, "`stop_token_ids` is (5, 5, 5, 5, 5, 5, ...): use at most 24 token ids"),
        ({"max_tokens": 0}, "`max_tokens` is 0: use from 1 to 2147483647 tokens."),
        ({"max_tokens": 2**31}, "`max_tokens` is 2147483648"),
        ({"min_tokens": 20}, "`min_tokens` is 20: use at most `max_tokens`, which is 16."),
    ],
    ids=str,
)
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(SamplingParamsError) as error:
        SamplingParams(**arguments)
    assert message in str(error.value)
    assert error.value.parameter in arguments


@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_p=1e-30),
        SamplingParams(top_k=1, temperature=100),
        SamplingParams(min_p=1.0),
        SamplingParams(temperature=1.1e-5),
        SamplingParams(temperature=1.1e-5, repetition_penalty=0.001, frequency_penalty=2.0),
        SamplingParams(temperature=1.1e-5, repetition_penalty=1000, presence_penalty=-2.0),
    ],
    ids=str,
)
def test_at_the_bounds_of_float32_the_most_likely_token_is_drawn(params, scale):
    """Parameters that leave one token: no product or quotient may become infinite, or 0, on the way to the draw."""
    logits = (np.random.default_rng(0).permutation(VOCAB) - VOCAB // 2).astype(np.float32) * np.float32(scale)
    prompt, output = (1, 2, 2, 30), (2, 5, 5, 5)
    expected = expected_distribution(logits, dataclasses.replace(params, temperature=0.0), prompt, output)
    np.testing.assert_array_equal(draws(logits, params, 64, prompt, output), expected)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(SamplingParamsError, match="the vocabulary ends at token id 49"):
        SamplingParams(logit_bias=((50, 1.0),)).check_vocabulary(VOCAB)
    SamplingParams(logit_bias=((49, 1.0),), stop_token_ids=(49,)).check_vocabulary(VOCAB)


def test_a_row_that_samples_needs_a_seed():
    with pytest.raises(ValueError, match=r"Rows \[1\] sample without a seed"):
        SamplingBatch.from_params([SamplingParams(temperature=0), SamplingParams()], 2)
    assert SamplingParams(seed=1).with_seed(2).seed == 1
    assert SamplingParams().with_seed(2).seed == 2
