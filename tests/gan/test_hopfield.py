"""The codec against brute force, exact correlations and the noise that it must bear."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from gan import hopfield
from gan.features import code_features, feature_count, matrix_features
from gan.sequences.codes import all_codes, random_codes
from gan.sequences.correlation import autocorrelation


@pytest.mark.parametrize("length", [5, 6, 8, 9])
def test_the_code_and_its_negative_are_the_only_fixed_points(length: int, rng: np.random.Generator) -> None:
    states = all_codes(length)
    for code in random_codes(rng, 4, length):
        fields = np.asarray(hopfield.encode(code[None]))[0] @ states.T
        stable = states[((states.T * fields) >= 0).all(0)]  # a zero field keeps its chip
        assert {tuple(state) for state in stable} == {tuple(code), tuple(-code)}
        weights = jnp.broadcast_to(hopfield.encode(code[None]), (len(states), length, length))
        ends = np.asarray(hopfield.relax(weights, states))
        assert (np.abs(ends @ code) == length).all()


@pytest.mark.parametrize("length", [18, 26, 32, 59, 98])
def test_decoding_undoes_encoding_up_to_the_sign(length: int, rng: np.random.Generator) -> None:
    codes = random_codes(rng, 10_000, length)
    for part in np.split(codes, 10):
        decoded = hopfield.decode(hopfield.encode(part))
        np.testing.assert_array_equal(decoded.codes, part * part[:, :1])
        np.testing.assert_allclose(decoded.margin, 1, atol=1e-6)
        np.testing.assert_allclose(decoded.fit, 1, atol=1e-5)


def test_relaxing_never_raises_the_energy(rng: np.random.Generator) -> None:
    weights = hopfield.symmetric(rng.standard_normal((50, 20, 20)).astype(np.float32))
    states = random_codes(rng, 50, 20)
    energies = [np.asarray(hopfield.energy(weights, hopfield.relax(weights, states, n))) for n in (0, 1, 2, 100)]
    for before, after in itertools.pairwise(energies):
        assert (after <= before + 1e-4).all()


# Exact-decode rates measured independently, 100 trials each; +-0.1 is two standard deviations of such a rate.
_GAUSSIAN = {(32, 2): 1.00, (32, 3): 0.85, (32, 4): 0.35, (59, 3): 0.99, (59, 4): 0.77}
_FLIPS = {(32, 0.2): 0.99, (32, 0.3): 0.72, (32, 0.35): 0.29, (59, 0.3): 0.95, (59, 0.35): 0.58, (59, 0.4): 0.01}


def test_damaged_matrices_still_decode(rng: np.random.Generator) -> None:
    for (length, deviation), rate in _GAUSSIAN.items():
        codes = random_codes(rng, 300, length)
        noise = deviation * rng.standard_normal((300, length, length)).astype(np.float32)
        assert _rate(np.asarray(hopfield.encode(codes)) + noise, codes) == pytest.approx(rate, abs=0.1)
    for (length, share), rate in _FLIPS.items():
        codes = random_codes(rng, 300, length)
        upper = np.triu(rng.random((300, length, length)) < share, 1)
        flipped = np.where(upper | upper.swapaxes(1, 2), -1.0, 1.0).astype(np.float32)
        assert _rate(np.asarray(hopfield.encode(codes)) * flipped, codes) == pytest.approx(rate, abs=0.1)


def _rate(matrices: np.ndarray, codes: np.ndarray) -> float:
    return float((np.asarray(hopfield.decode(matrices).codes) == codes * codes[:, :1]).all(1).mean())


def test_superdiagonal_sums_are_autocorrelations(rng: np.random.Generator) -> None:
    codes = random_codes(rng, 1000, 31)
    sums = hopfield.superdiagonal_sums(hopfield.encode(codes))
    np.testing.assert_array_equal(sums, autocorrelation(codes)[:, 1:])


@pytest.mark.parametrize("shape", [(17,), (2, 9), (2, 2, 8), (3, 4, 4)])
def test_a_code_and_its_matrix_have_the_same_features(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    codes = random_codes(rng, 20, int(np.prod(shape)))
    of_code = code_features(codes, shape)
    of_matrix = matrix_features(hopfield.encode(codes), shape)
    assert of_code.shape == (20, feature_count(shape))
    # Power spectra go through a logarithm with floor 0.05: float32 rounding of order 1e-5 grows twentyfold.
    np.testing.assert_allclose(of_code, of_matrix, atol=1e-3)


def test_retrieval_turns_from_blend_to_memory(rng: np.random.Generator) -> None:
    memories = random_codes(rng, 6, 40)
    query = memories[:1] * np.where(np.arange(40) < 5, -1, 1)[None]
    np.testing.assert_allclose(hopfield.retrieve(memories, query, 5.0)[0], memories[0], atol=1e-4)
    np.testing.assert_allclose(hopfield.retrieve(memories, query, 0.0)[0], memories.mean(0), atol=1e-6)
