"""From measured times to a performance model: non-negative least squares on relative errors, outliers left out.

Times come from a machine that others use too, so a few are far too long; the fit is repeated without those.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.optimize import nnls

from serving.conductor import TimeModel
from serving.simulator.errors import SimulatorError
from serving.simulator.steps import StepModel, StepWork

# A sample further from the fit than so many robust standard deviations was disturbed; a smaller spread than `_LEAST`
# (relative) is taken for that, so that a clean measurement keeps all its samples.
_OUTLIER, _LEAST, _ROUNDS = 4.0, 0.01, 3
_QUANTILES = 200


@dataclasses.dataclass(frozen=True, slots=True)
class StepSample:
    """One measured step."""

    work: StepWork
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class PrefillSample:
    """Seconds of one prompt of `tokens` tokens of which the first `reused` were cached."""

    tokens: int
    reused: int
    seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeSample:
    """Seconds of one iteration of `batch` sequences that attend to `tokens` KV tokens in all."""

    batch: int
    tokens: int
    seconds: float


def fit_steps(samples: Sequence[StepSample]) -> StepModel:
    """The cost of each shape among `samples`, and of what fills it."""
    shapes = sorted({sample.work.shape for sample in samples})
    place = {shape: index for index, shape in enumerate(shapes)}
    features = np.zeros((len(samples), len(shapes) + 4))
    for row, sample in zip(features, samples, strict=True):
        work = sample.work
        row[place[work.shape]] = 1.0
        row[-4:] = work.decodes, work.decode_tokens, work.prefill_tokens, work.prefill_pairs
    weights = _fit(features, _seconds(samples))
    table = tuple((*shape, float(weight)) for shape, weight in zip(shapes, weights, strict=False))
    decode_sequence, decode_token, prefill_token, prefill_pair = map(float, weights[-4:])
    return StepModel(
        shapes=table,
        decode_sequence=decode_sequence,
        decode_token=decode_token,
        prefill_token=prefill_token,
        prefill_pair=prefill_pair,
    )


def step_noise(model: StepModel, samples: Sequence[StepSample]) -> StepModel:
    """`model` with the factors by which `samples` differ from it: single steps, not medians of several."""
    factors: dict[bool, list[float]] = {False: [], True: []}
    for sample in samples:
        factors[bool(sample.work.chunks)].append(sample.seconds / model.seconds(sample.work))
    decode, prefill = (_quantiles(factors[chunks]) for chunks in (False, True))
    return dataclasses.replace(model, decode_noise=decode, prefill_noise=prefill)


def fit_times(
    prefills: Sequence[PrefillSample], decodes: Sequence[DecodeSample], transfer_token: float = 0.0
) -> TimeModel:
    """The closed form that `CoupledNode`, `PrefillNode` and `DecodeNode` use, from whole prompts and iterations."""
    prompts = [(1.0, p.tokens - p.reused, p.tokens**2 - p.reused**2, p.reused) for p in prefills]
    iterations = [(1.0, d.batch, d.tokens) for d in decodes]
    base, token, pair, reused = map(float, _fit(np.array(prompts, float), _seconds(prefills)))
    decode_base, decode_sequence, decode_token = map(float, _fit(np.array(iterations, float), _seconds(decodes)))
    return TimeModel(
        prefill_base=base,
        prefill_token=token,
        prefill_pair=pair,
        prefill_reused=reused,
        decode_base=decode_base,
        decode_sequence=decode_sequence,
        decode_token=decode_token,
        transfer_token=transfer_token,
    )


def errors(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """Relative errors: their median (bias), and the median and 90th percentile of their size."""
    relative = np.asarray(predicted) / np.asarray(measured) - 1
    return {
        "bias": float(np.median(relative)),
        "p50": float(np.percentile(abs(relative), 50)),
        "p90": float(np.percentile(abs(relative), 90)),
    }


def _quantiles(values: Sequence[float]) -> tuple[float, ...]:
    """At most `_QUANTILES` evenly spaced ones."""
    count = min(len(values), _QUANTILES)
    return tuple(np.quantile(values, (np.arange(count) + 0.5) / count).tolist()) if count else ()


def _seconds(samples: Sequence[StepSample | PrefillSample | DecodeSample]) -> np.ndarray:
    seconds = np.array([sample.seconds for sample in samples], float)
    if not (len(seconds) and (seconds > 0).all()):
        raise SimulatorError(f"{len(seconds)} samples, of which {sum(seconds <= 0)} took no time: measure some work.")
    return seconds


def _fit(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Weights of at least 0 that minimise the squared relative errors of samples [N, F] and [N]."""
    kept = np.ones(len(seconds), bool)
    weights = np.zeros(features.shape[1])
    for _ in range(_ROUNDS):
        rows = features[kept] / seconds[kept, None]
        scales = np.linalg.norm(rows, axis=0)
        scales[scales == 0] = 1.0
        weights = nnls(rows / scales, np.ones(kept.sum()))[0] / scales
        relative = features @ weights / seconds - 1
        off = abs(relative - np.median(relative))
        kept = off <= _OUTLIER * max(1.4826 * float(np.median(off)), _LEAST)
        # Whatever only outliers say something about is still learned from them.
        unknown = (features != 0).any(axis=0) & ~(features[kept] != 0).any(axis=0)
        kept |= (features[:, unknown] != 0).any(axis=1)
    return weights
