"""Simulated annealing: single-chip flips by the Metropolis rule while the temperature falls, again and again."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gan.baselines.driver import Advance, chain_count, drive, random_words, scanned
from gan.ledger import Ledger
from gan.problems import Problem
from gan.search import Search

_SAMPLE = 256  # random codes whose spread sets the temperatures


@dataclasses.dataclass(frozen=True)
class AnnealingSettings:
    """The schedule.

    Attributes:
        chains: chains at once; None for as many as the budget gives one descent (up to 1024).
        sweeps: flips tried in one descent of the temperature, per chip; then a chain starts anew.
        hot, cold: first and last temperature, in units of the spread that the scores of random codes have. They are
            compared as `Problem.altitude`s.
    """

    chains: int | None = None
    sweeps: int = 100
    hot: float = 1.0
    cold: float = 0.05


class _Chains(NamedTuple):
    codes: jax.Array  # int8 [C, chips]
    altitude: jax.Array  # float32 [C]
    spread: jax.Array  # float32 [], of the altitudes of random codes
    step: jax.Array  # int32 []


def _search(ledger: Ledger, settings: AnnealingSettings) -> None:
    problem = ledger.problem
    chains = settings.chains or chain_count(ledger.budget, settings.sweeps * problem.chips)
    sample = problem.random(np.random.default_rng(ledger.seed), _SAMPLE)
    scores = problem.score(sample)
    ledger.charge(1 + np.arange(_SAMPLE), sample[None], np.asarray(scores)[None])
    spread = problem.altitude(scores).std()
    start = _Chains(jnp.ones((chains, problem.chips), jnp.int8), jnp.zeros(chains), spread, jnp.int32(0))
    drive(ledger, _advance(problem, settings), start, 1 + np.arange(chains))


run = Search("annealing", _search, AnnealingSettings)
"""Every proposal counts as one evaluation."""


@functools.cache
def _advance(problem: Problem, settings: AnnealingSettings) -> Advance[_Chains]:
    return scanned(functools.partial(_step, problem, settings))


def _step(
    problem: Problem, settings: AnnealingSettings, chains: _Chains, key: jax.Array
) -> tuple[_Chains, tuple[jax.Array, jax.Array]]:
    count, chips = chains.codes.shape
    length = settings.sweeps * chips
    at = chains.step % length
    temperature = (
        chains.spread * settings.hot * (settings.cold / settings.hot) ** (at.astype(jnp.float32) / (length - 1))
    )
    words = random_words(key, (count, chips + 2))
    flip = (words[:, chips] % chips).astype(jnp.int32)
    flipped = jnp.where(jnp.arange(chips)[None] == flip[:, None], -chains.codes, chains.codes)
    fresh = 1 - 2 * (words[:, :chips] >> 31).astype(jnp.int8)
    proposal = jnp.where(at == 0, fresh, flipped)
    score = problem.score(proposal)
    altitude = problem.altitude(score)
    uniform = (words[:, chips + 1].astype(jnp.float32) + 1) / 2.0**32
    accepted = (at == 0) | (altitude - chains.altitude >= temperature * jnp.log(uniform))
    codes = jnp.where(accepted[:, None], proposal, chains.codes)
    altitude = jnp.where(accepted, altitude, chains.altitude)
    return _Chains(codes, altitude, chains.spread, chains.step + 1), (score, proposal)
