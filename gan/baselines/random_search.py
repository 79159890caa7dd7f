"""Uniform random search: the floor under every method."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from gan.baselines.driver import Advance, drive, random_chips, scanned
from gan.ledger import Ledger
from gan.problems import Problem
from gan.search import Search


@dataclasses.dataclass(frozen=True)
class RandomSettings:
    """`batch`: codes scored at a time, at most the budget."""

    batch: int = 2048


def _search(ledger: Ledger, settings: RandomSettings) -> None:
    batch = min(settings.batch, ledger.budget)
    drive(ledger, _advance(ledger.problem, batch), jnp.zeros(()), 1 + np.arange(batch))


run = Search("random", _search, RandomSettings)
"""Scores uniform random codes."""


@functools.cache
def _advance(problem: Problem, batch: int) -> Advance[jax.Array]:
    def step(state: jax.Array, key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        codes = random_chips(key, (batch, problem.chips))
        return state, (problem.score(codes), codes)

    return scanned(step)
