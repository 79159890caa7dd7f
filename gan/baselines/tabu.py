"""Tabu search: each step takes the best single-chip flip of every walk, even a worse one, and locks that chip."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gan.baselines.driver import Advance, chain_count, drive, random_chips, random_words, scanned
from gan.ledger import Ledger
from gan.problems import Problem
from gan.search import Search

_LEAST_STEPS = 1000  # of a chain: shorter walks find nothing


@dataclasses.dataclass(frozen=True)
class TabuSettings:
    """Shape of a walk.

    Attributes:
        chains: walks at once; None for as many as the budget gives a thousand steps (up to 1024).
        tenure: least and most steps for which a flipped chip stays, as shares of the chips.
        patience: steps without a better code in the walk, per chip, after which it starts anew.
    """

    chains: int | None = None
    tenure: tuple[float, float] = (0.1, 0.3)
    patience: float = 4.0


class _Walks(NamedTuple):
    codes: jax.Array  # int8 [C, chips]
    free_at: jax.Array  # int32 [C, chips], the step from which a chip may be flipped again
    best: jax.Array  # float32 [C], of this walk
    since: jax.Array  # int32 [C], steps since it was found
    step: jax.Array  # int32 []


def _search(ledger: Ledger, settings: TabuSettings) -> None:
    problem = ledger.problem
    chains = settings.chains or chain_count(ledger.budget // problem.chips, _LEAST_STEPS)
    shape = (chains, problem.chips)
    zeros = jnp.zeros(chains, jnp.int32)
    # An exhausted patience: the first step starts every walk.
    start = _Walks(jnp.ones(shape, jnp.int8), jnp.zeros(shape, jnp.int32), zeros - jnp.inf, zeros + 2**30, zeros[0])
    drive(ledger, _advance(problem, settings), start, problem.chips * (1 + np.arange(chains)))


run = Search("tabu", _search, TabuSettings)
"""Every scored flip counts as one evaluation; a walk's step is known when all its flips are scored."""


@functools.cache
def _advance(problem: Problem, settings: TabuSettings) -> Advance[_Walks]:
    return scanned(functools.partial(_step, problem, settings))


def _step(
    problem: Problem, settings: TabuSettings, walks: _Walks, key: jax.Array
) -> tuple[_Walks, tuple[jax.Array, jax.Array]]:
    chips = problem.chips
    fresh_key, tie_key = jax.random.split(key)
    restart = walks.since > settings.patience * chips
    codes = jnp.where(restart[:, None], random_chips(fresh_key, walks.codes.shape), walks.codes)
    best = jnp.where(restart, -jnp.inf, walks.best)
    free_at = jnp.where(restart[:, None], 0, walks.free_at)
    scores = problem.score_flips(codes)
    allowed = (free_at <= walks.step) | (scores > best[:, None])
    words = random_words(tie_key, (scores.shape[0], chips + 1))
    # Scores are integers or far apart where it matters: a thousandth of one breaks ties at random.
    jitter = words[:, :chips].astype(jnp.float32) * (1e-3 / 2**32)
    flip = jnp.where(allowed, scores + jitter, -jnp.inf).argmax(-1)
    chosen = jnp.arange(chips)[None] == flip[:, None]
    codes = jnp.where(chosen, -codes, codes)
    score = jnp.where(chosen, scores, -jnp.inf).max(-1)
    low, high = (max(1.0, share * chips) for share in settings.tenure)
    tenure = low + words[:, chips].astype(jnp.float32) * ((high - low) / 2**32)
    free_at = jnp.where(chosen, walks.step + 1 + tenure.astype(jnp.int32)[:, None], free_at)
    improved = score > best
    since = jnp.where(improved, 0, jnp.where(restart, 0, walks.since) + 1)
    return _Walks(codes, free_at, jnp.maximum(best, score), since, walks.step + 1), (score, codes)
