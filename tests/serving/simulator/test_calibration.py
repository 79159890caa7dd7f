"""Fits find what made the samples, whatever a few disturbed ones say; noise is what single steps are off by."""

import numpy as np
import pytest

from serving.simulator.calibration import StepSample, fit_steps, step_noise
from serving.simulator.steps import StepModel, StepWork

MODEL = StepModel(
    shapes=((2, 0, 0, 1e-3), (2, 1, 16, 4e-3)),
    decode_sequence=1e-4,
    decode_token=2e-6,
    prefill_token=3e-5,
    prefill_pair=5e-9,
)


def samples(factor: np.ndarray, rng: np.random.Generator) -> list[StepSample]:
    made = []
    for number, share in enumerate(factor):
        chunks = number % 2
        tokens = int(rng.integers(1, 17)) * chunks
        shape, context = ((2, 1, 16) if chunks else (2, 0, 0)), int(rng.integers(10, 4000))
        work = StepWork(
            shape=shape,
            decodes=int(rng.integers(1, 3)),
            decode_tokens=context,
            chunks=chunks,
            prefill_tokens=tokens,
            prefill_pairs=tokens * (2 * context + tokens),
        )
        made.append(StepSample(work, MODEL.seconds(work) * share))
    return made


def test_a_fit_finds_the_model_despite_disturbances(rng: np.random.Generator) -> None:
    factors = np.ones(400)
    factors[::9] = 3.0
    fitted = fit_steps(samples(factors, rng))
    for sample in samples(np.ones(50), rng):
        assert fitted.seconds(sample.work) == pytest.approx(MODEL.seconds(sample.work), rel=1e-3)


def test_noise_is_the_distribution_of_what_steps_are_off_by(rng: np.random.Generator) -> None:
    factors = rng.lognormal(0.0, 0.2, 6000)
    factors[1::2] *= 1.5
    model = step_noise(MODEL, samples(factors, rng))
    for noise, part in ((model.decode_noise, factors[::2]), (model.prefill_noise, factors[1::2])):
        assert len(noise) == 200
        assert list(noise) == sorted(noise)
        assert np.mean(noise) == pytest.approx(part.mean(), rel=0.01)
        assert np.quantile(noise, 0.9) == pytest.approx(np.quantile(part, 0.9), rel=0.02)
    work = samples(np.ones(1), rng)[0].work
    assert model.mean_s(work) == pytest.approx(MODEL.seconds(work) * factors[::2].mean(), rel=0.01)
    assert step_noise(MODEL, samples(np.ones(1), rng)).decode_noise == (1.0,)
    assert step_noise(MODEL, []).noise_of(work) == ()
