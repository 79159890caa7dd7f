"""The ledger counts distinct codes once, stops at its budget and certifies what it found."""

import itertools

import numpy as np
import pytest

from gan.hash_set import HashSet
from gan.ledger import BudgetSpentError, Ledger
from gan.problems import problem
from gan.sequences.codes import all_codes, hash_codes, pack, unpack


def test_distinct_codes_are_counted_once(rng: np.random.Generator) -> None:
    mmf = problem("mmf", 21)
    ledger = Ledger(mmf, 1000)
    codes = mmf.random(rng, 100)
    first = ledger.evaluate(np.concatenate([codes, codes[:30]]))
    assert ledger.evaluations == 100
    np.testing.assert_allclose(first[100:], first[:30], rtol=1e-5)
    np.testing.assert_allclose(ledger.evaluate(codes), first[:100], rtol=1e-5)
    assert ledger.evaluations == 100


def test_the_budget_covers_codes_in_order(rng: np.random.Generator) -> None:
    mmf = problem("mmf", 21)
    ledger = Ledger(mmf, 60)
    scores = ledger.evaluate(mmf.random(rng, 100))
    assert np.isfinite(scores[:60]).all()
    assert np.isneginf(scores[60:]).all()
    assert ledger.spent
    with pytest.raises(BudgetSpentError, match="all 60 evaluations"):
        ledger.evaluate(mmf.random(rng, 1))


def test_the_curve_is_the_running_maximum(rng: np.random.Generator) -> None:
    mmf = problem("mmf", 31)
    ledger = Ledger(mmf, 5000)
    codes = mmf.random(rng, 5000)
    scores = np.concatenate([ledger.evaluate(batch) for batch in np.split(codes, 10)])
    result = ledger.result()
    running = np.maximum.accumulate(scores)
    for point, after in itertools.pairwise(result.curve):
        assert (running[point.evaluations - 1 : after.evaluations - 1] == np.float32(point.best)).all()
    assert result.best == scores.max()
    assert result.evaluations_to(result.best) == int(scores.argmax()) + 1
    assert result.evaluations_to(1e9) is None
    (entry,) = result.entries
    assert entry.value == pytest.approx(result.best, rel=1e-5)
    assert entry.evaluation == int(scores.argmax()) + 1
    assert not entry.hit  # the best code of a search without a hit


def test_hits_are_kept_once_and_certified() -> None:
    pair = problem("ob_zcp", 5, kind=1)
    ledger = Ledger(pair, 2**10, "all")
    ledger.evaluate(all_codes(10))
    result = ledger.result()
    assert (result.evaluations, len(result.entries), result.classes) == (1024, 96, 2)
    assert {(entry.value, entry.hit) for entry in result.entries} == {(0.0, True)}


def test_charges_count_what_the_caller_evaluated() -> None:
    pair = problem("ob_zcp", 5, kind=1)
    codes = all_codes(10)
    scores = np.array(pair.score(codes))
    order = scores.argsort()
    worst, best = order[:3], order[-1:]

    ledger = Ledger(pair, 100)
    ledger.charge(np.array([30]), codes[worst][:, None], scores[worst][:, None])
    assert (ledger.evaluations, ledger.hits, ledger.spent) == (90, 0, False)
    ledger.charge(np.array([20]), codes[best][None], scores[best][None])
    assert (ledger.evaluations, ledger.hits, ledger.spent) == (100, 0, True)

    ledger = Ledger(pair, 100, stop_at=0.0)
    mixed = np.concatenate([worst[:1], best, worst[1:]])
    ledger.charge(np.array([20]), codes[mixed][:, None], scores[mixed][:, None])
    assert (ledger.evaluations, ledger.hits, ledger.spent) == (40, 1, True)
    assert ledger.result().evaluations_to(0.0) == 40


def test_a_code_is_known_before_its_step_ends() -> None:
    pair = problem("ob_zcp", 5, kind=1)
    codes = all_codes(10)
    order = np.array(pair.score(codes)).argsort()
    step = np.concatenate([order[:2], order[-2:]])  # two hits after two others
    codes, scores = codes[step], np.array(pair.score(codes[step]))
    for budget, found in ((100, [7 + 3, 7 + 4]), (10, [10]), (9, [])):
        ledger = Ledger(pair, budget)
        ledger.charge(np.array([7]), codes[None, :1], scores[None, :1])
        ledger.charge(np.arange(1, 5), codes[None], scores[None])
        entries = ledger.result().entries
        assert [entry.evaluation for entry in entries if entry.hit] == found
        assert ledger.evaluations == min(budget, 11)


def test_gradients_have_a_second_bill() -> None:
    mmf = problem("mmf", 21)
    ledger = Ledger(mmf, 50)
    ledger.evaluate(all_codes(21, count=10))
    ledger.charge_gradients(4, scores=1)
    ledger.evaluate(-all_codes(21, count=10))
    result = ledger.result()
    end = result.curve[-1]
    assert (end.evaluations, end.gradients) == (25, 4)
    assert result.bill_at_chips(end) == 21 + 4 * 21
    ledger.charge_gradients(1000)
    assert (ledger.evaluations, ledger.gradients) == (50, 4 + 25)


def test_a_search_ends_when_the_processor_time_is_up() -> None:
    ledger = Ledger(problem("mmf", 21), 10**6, cpu_limit_s=0.0)
    assert ledger.spent
    assert Ledger(problem("mmf", 21), 10**6, cpu_limit_s=1e6).cpu_s < 1e6


def test_stop_at_ends_the_search_early() -> None:
    pair = problem("ob_zcp", 5, kind=1)
    ledger = Ledger(pair, 10**6, stop_at=0.0)
    ledger.evaluate(all_codes(10))
    assert ledger.spent
    assert ledger.remaining > 0


def test_hash_set_agrees_with_a_set(rng: np.random.Generator) -> None:
    ours, theirs = HashSet(), set()
    for _ in range(20):
        keys = rng.integers(1, 30_000, 4000).astype(np.uint64)
        expected = []
        for key in keys.tolist():
            expected.append(key not in theirs)
            theirs.add(key)
        np.testing.assert_array_equal(ours.add(keys), expected)
    assert len(ours) == len(theirs)


def test_packed_words_keep_the_order_and_hashes_differ(rng: np.random.Generator) -> None:
    codes = all_codes(12)
    words = pack(codes)
    assert (np.diff(words[:, 0].astype(np.float64)) > 0).all()
    wide = np.concatenate([codes, np.tile(codes, (1, 6))[:, ::-1][:, :60]], axis=1)
    np.testing.assert_array_equal(unpack(pack(wide), 72), wide)
    assert np.unique(hash_codes(wide)).size == len(wide)
