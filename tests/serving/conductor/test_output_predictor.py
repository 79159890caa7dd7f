"""Outputs of single requests: what is known of their conversation counts, and what is not does no harm."""

import random
import statistics

import pytest

from serving.conductor.output_predictor import OutputPredictor

SYSTEM = 0


def conversations(rng: random.Random, count: int, like_before: float):
    """(blocks, output tokens) of turns: a share of each answer's length is its conversation's own."""
    talks = []
    for index in range(count):
        if not talks or rng.random() < 0.4:
            talks.append(((SYSTEM,), rng.uniform(50, 750)))
        place = rng.randrange(max(0, len(talks) - 20), len(talks))
        blocks, own = talks[place]
        blocks = (*blocks, *range(1000 * (index + 1), 1000 * (index + 1) + 3))
        talks[place] = blocks, own
        yield blocks, max(1, round(like_before * own + (1 - like_before) * rng.uniform(50, 750)))


def played(like_before: float, seed: int = 0) -> tuple[OutputPredictor, float, float]:
    """The predictor after many turns, its mean error over the last half, and that of the plain mean."""
    predictor, errors, outputs = OutputPredictor(), [], []
    for blocks, tokens in conversations(random.Random(seed), 6000, like_before):
        predicted = predictor.predict(blocks)
        errors.append(abs(predicted - tokens))
        outputs.append(tokens)
        predictor.observe(blocks, predicted, tokens)
    half = outputs[3000:]
    mean = statistics.mean(half)
    return predictor, statistics.mean(errors[3000:]), statistics.mean(abs(tokens - mean) for tokens in half)


def test_it_predicts_better_than_the_mean_where_conversations_differ() -> None:
    _, error, of_mean = played(0.8)
    assert error < 0.75 * of_mean


def test_it_is_as_good_as_the_mean_where_they_do_not() -> None:
    _, error, of_mean = played(0.0)
    assert error == pytest.approx(of_mean, rel=0.03)


def test_it_reports_its_error() -> None:
    predictor = OutputPredictor(prior_mean=100.0)
    predictor.observe((), predictor.predict(()), 140)
    assert predictor.error.absolute == pytest.approx(40.0)


def test_what_a_conversation_generated_is_used_for_its_next_turn_only() -> None:
    predictor, _, _ = played(0.8)
    predictor.observe((SYSTEM, 7, 8), 400.0, 900)
    mean = predictor.predict((5, 6))
    assert predictor.predict((SYSTEM, 7, 8, 9)) > mean
    # A block in common that many prompts had says nothing; one that nobody ended at neither.
    assert predictor.predict((SYSTEM, 17)) == pytest.approx(mean, rel=0.1)


def test_survival_follows_the_prediction() -> None:
    predictor, _, _ = played(0.8)
    assert predictor.survival(400.0, 0, 0) == pytest.approx(1.0)
    assert predictor.survival(800.0, 200, 200) > predictor.survival(300.0, 200, 200)
    assert predictor.survival(300.0, 0, 6000) < 0.05


def test_it_forgets_the_oldest() -> None:
    predictor = OutputPredictor(entries=2)
    for first in range(0, 400, 2):
        tokens = 900 if first % 4 else 100
        for blocks in ((first,), (first, first + 1)):
            predictor.observe(blocks, predictor.predict(blocks), tokens)
    for block, tokens in ((1000, 900), (1001, 100), (1002, 900)):
        predictor.observe((block,), 500.0, tokens)
    first, second, third = (predictor.predict((block, 9)) for block in (1000, 1001, 1002))
    assert first == predictor.predict((5000,))
    assert second < 200 < 800 < third
