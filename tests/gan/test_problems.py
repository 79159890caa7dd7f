"""The three problems: scores against exact values, symmetries, gauges, text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gan.problems import Problem, problem

CASES = [
    problem("mmf", 13),
    problem("mmf", 59),
    problem("mmf", 70),
    problem("ob_zcp", 9, kind=1),
    problem("ob_zcp", 13, kind=2),
    problem("ob_zcp_folded", 13, kind=1),
    problem("mocss", 8),
    problem("mocss", 4, flocks=4, sequences=4),
    problem("mocss", 5, flocks=2, sequences=3),
    problem("mocss", 6, flocks=1, sequences=2),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


@cases
def test_score_is_the_exact_value(case: Problem, rng: np.random.Generator) -> None:
    codes = case.random(rng, 32)
    exact = np.array([float(case.exact(code)) for code in codes])
    np.testing.assert_allclose(np.array(case.score(codes)), exact, rtol=1e-5)
    assert case.values(codes) == exact.tolist()


@cases
def test_other_devices_run_plain_jax(case: Problem) -> None:
    codes = np.ones((64, case.chips), np.int8)
    slope = jax.grad(lambda x: case.soft_score(x).sum())
    for function, argument in ((case._score, codes), (case._score_flips, codes), (slope, codes.astype(np.float32))):
        lowered = jax.jit(function).trace(argument).lower(lowering_platforms=("cuda",))
        assert "halfmoon" not in lowered.as_text()  # the names of the CPU's kernels


@cases
def test_flips_score_as_flipped_codes_do(case: Problem, rng: np.random.Generator) -> None:
    codes = case.random(rng, 5)
    flipped = codes[:, None] * (1 - 2 * np.eye(case.chips, dtype=np.int8))
    expected = np.array(case.score(flipped.reshape(-1, case.chips))).reshape(codes.shape)
    np.testing.assert_allclose(np.array(case.score_flips(codes)), expected, rtol=2e-5)


@cases
def test_symmetries_keep_the_value_and_the_class(case: Problem, rng: np.random.Generator) -> None:
    code = case.random(rng, 1)[0]
    orbit = case.orbit(code)
    sample = orbit[rng.integers(0, len(orbit), 24)]
    assert case.group.order % len(orbit) == 0
    assert {case.exact(member) for member in sample} == {case.exact(code)}
    assert set(case.class_ids(sample)) == {case.class_id(code)}
    representative = case.canonical(code[None])[0]
    assert (representative == orbit[orbit.shape[0] - 1]).all(), "not the first member with + before -"
    assert case.class_id(case.random(rng, 1)[0]) != case.class_id(code)


@cases
def test_gauge_stays_in_the_class_and_is_idempotent(case: Problem, rng: np.random.Generator) -> None:
    codes = case.random(rng, 16)
    fixed = case.gauge(codes)
    assert case.class_ids(fixed) == case.class_ids(codes)
    np.testing.assert_array_equal(case.gauge(fixed), fixed)
    np.testing.assert_array_equal(np.array(jax.jit(case.gauge)(jnp.asarray(codes))), fixed)


@cases
def test_text_round_trip(case: Problem, rng: np.random.Generator) -> None:
    code = case.random(rng, 1)[0]
    np.testing.assert_array_equal(case.from_text(case.to_text(code)), code)


@cases
def test_soft_score_agrees_on_codes_and_has_the_gradient_of_finite_differences(
    case: Problem, rng: np.random.Generator
) -> None:
    codes = case.random(rng, 4).astype(np.float32)
    hard = np.array(case.score(codes.astype(np.int8)))
    expected = np.log(hard) if case.name == "mmf" else hard
    np.testing.assert_allclose(np.array(jax.jit(case.soft_score)(jnp.asarray(codes))), expected, rtol=1e-4, atol=1e-4)
    # Away from the kinks that |A(u)| has at 0.
    x = codes * rng.uniform(0.3, 1.0, codes.shape).astype(np.float32)
    direction = rng.normal(size=x.shape).astype(np.float32)
    soft = jax.jit(case.soft_score)
    gradient = jax.jit(jax.grad(lambda x: case.soft_score(x).sum()))(jnp.asarray(x))
    step = 1e-2
    ahead, behind = (np.array(soft(jnp.asarray(x + sign * step * direction))) for sign in (1, -1))
    slope = (ahead - behind).astype(np.float64).sum() / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=2e-2, abs=2e-2)


@pytest.mark.parametrize(
    ("arguments", "parameters", "message"),
    [
        (("golomb", 8), {}, "must be one of mmf, mmf_skew, ob_zcp, ob_zcp_folded, mocss"),
        (("ob_zcp", 8), {}, "needs an odd length"),
        (("ob_zcp", 9), {"kind": 3}, "`kind` is 3"),
        (("mocss", 8), {"flocks": 3}, "no more flocks than sequences"),
        (("mmf", 1), {}, "at least 3 chips"),
        (("mmf", 9), {"kind": 1}, "`kind` is no parameter of mmf"),
    ],
)
def test_impossible_problems_are_refused(arguments: tuple[str, int], parameters: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        problem(*arguments, **parameters)


def test_malformed_text_is_refused() -> None:
    pair = problem("ob_zcp", 5)
    with pytest.raises(ValueError, match="has 2 sequences, got 1"):
        pair.from_text(["+++++"])
    with pytest.raises(ValueError, match="has 4 chips, must have 5"):
        pair.from_text(["+++++", "++++"])
    with pytest.raises(ValueError, match="holds '0'"):
        pair.from_text(["+++++", "++0++"])
