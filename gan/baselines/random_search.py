"""Uniform random search: the floor under every method."""

import functools

import jax
import jax.numpy as jnp

from gan.baselines.driver import Advance, drive, random_chips, scanned
from gan.ledger import Ledger, Progress, SearchResult
from gan.problems import Problem

_BATCH = 2048


def run(
    problem: Problem, budget: int, seed: int, progress: Progress | None = None, *, stop_at: float | None = None
) -> SearchResult:
    """Scores random codes until `budget` evaluations are spent or a score reaches `stop_at`."""
    ledger = Ledger(problem, budget, "random", seed, stop_at=stop_at, progress=progress)
    batch = min(_BATCH, budget)
    return drive(ledger, _advance(problem, batch), jnp.zeros(()), batch)


@functools.cache
def _advance(problem: Problem, batch: int) -> Advance[jax.Array]:
    def step(state: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        codes = random_chips(key, (batch, problem.chips))
        return state, (problem.score(codes), codes)

    return scanned(step)
