"""The cross-entropy method: independent chips whose probabilities follow the best samples."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gan.baselines.driver import Advance, drive, random_words, scanned
from gan.ledger import Ledger
from gan.problems import Problem
from gan.search import Search


@dataclasses.dataclass(frozen=True)
class CrossEntropySettings:
    """Sizes and rates.

    Attributes:
        samples: codes drawn in a generation, of each population.
        elites: best samples that move the probabilities.
        populations: independent distributions that share the budget.
        rate: how far the probabilities move towards the elites' frequencies.
        floor: least probability of either sign; a population starts anew once all its chips are within twice this of
            certain, or after `patience` generations without a better code.
    """

    samples: int = 1000
    elites: int = 100
    populations: int = 1
    rate: float = 0.3
    floor: float = 0.01
    patience: int = 30


class _Populations(NamedTuple):
    minus: jax.Array  # float32 [P, chips], probability of -1
    best: jax.Array  # float32 [P]
    stale: jax.Array  # int32 [P]


def _search(ledger: Ledger, settings: CrossEntropySettings) -> None:
    problem, count = ledger.problem, settings.populations
    start = _Populations(jnp.full((count, problem.chips), 0.5), jnp.full(count, -jnp.inf), jnp.zeros(count, jnp.int32))
    drive(ledger, _advance(problem, settings), start, 1 + np.arange(count * settings.samples))


run = Search("cem", _search, CrossEntropySettings)
"""Every sample counts as one evaluation."""


@functools.cache
def _advance(problem: Problem, settings: CrossEntropySettings) -> Advance[_Populations]:
    return scanned(functools.partial(_generation, problem, settings))


def _generation(
    problem: Problem, settings: CrossEntropySettings, populations: _Populations, key: jax.Array
) -> tuple[_Populations, tuple[jax.Array, jax.Array]]:
    count, chips = populations.minus.shape
    uniform = random_words(key, (count, settings.samples, chips)).astype(jnp.float32) / 2.0**32
    codes = problem.gauge(jnp.where(uniform < populations.minus[:, None], -1, 1).astype(jnp.int8).reshape(-1, chips))
    scores = problem.score(codes)
    top, order = jax.lax.top_k(scores.reshape(count, -1), settings.elites)
    elites = codes.reshape(count, -1, chips)[jnp.arange(count)[:, None], order]
    frequency = (elites < 0).astype(jnp.float32).mean(1)
    minus = populations.minus + settings.rate * (frequency - populations.minus)
    minus = jnp.clip(minus, settings.floor, 1 - settings.floor)
    improved = top[:, 0] > populations.best
    stale = jnp.where(improved, 0, populations.stale + 1)
    doubt = jnp.minimum(minus, 1 - minus).max(-1)
    restart = (doubt < 2 * settings.floor) | (stale > settings.patience)
    state = _Populations(
        jnp.where(restart[:, None], 0.5, minus),
        jnp.where(restart, -jnp.inf, jnp.maximum(populations.best, top[:, 0])),
        jnp.where(restart, 0, stale),
    )
    return state, (scores, codes)
