"""Genetic and memetic search: truncation selection over elites without duplicates, restarted when it stalls.

Islands are independent populations that share a budget. With `polish` above 0 the search is memetic: every generation
scores all single-chip flips of that many elites of each island, and the best flip of each competes with the children.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gan.baselines.driver import Advance, drive, random_chips, random_words, scanned
from gan.ledger import Ledger
from gan.problems import Problem
from gan.search import Search


@dataclasses.dataclass(frozen=True)
class GeneticSettings:
    """Sizes and rates.

    Attributes:
        elites, children: codes that survive and codes that are made in a generation, of each island.
        islands: independent populations.
        polish: elites of each island whose flips are scored in a generation.
        stale: generations without a better best code after which an island starts again.
        uniform: share of children by uniform crossover; the others by two-point crossover.
        mutations: expected flips of a child; each child draws one of these.
        shift, reverse: chances that a child's sequences are rotated by one chip, or reversed.
    """

    elites: int = 200
    children: int = 400
    islands: int = 1
    polish: int = 0
    stale: int = 60
    uniform: float = 0.2
    mutations: tuple[float, ...] = (0.5, 1.5, 4.0)
    shift: float = 0.1
    reverse: float = 0.05

    def __post_init__(self) -> None:
        if not 1 <= self.elites <= self.children:
            raise ValueError(f"{self.elites} elites out of {self.children} children: a restart needs as many children.")
        if not 0 <= self.polish <= self.elites:
            raise ValueError(f"`polish` is {self.polish}; it must be between 0 and the {self.elites} elites.")


class _Islands(NamedTuple):
    codes: jax.Array  # int8 [I, K, chips], best first
    scores: jax.Array  # float32 [I, K]
    stale: jax.Array  # int32 [I]


def _search(ledger: Ledger, settings: GeneticSettings) -> None:
    problem = ledger.problem
    shape = (settings.islands, settings.elites)
    start = _Islands(
        jnp.ones((*shape, problem.chips), jnp.int8), jnp.full(shape, -jnp.inf), jnp.full(shape[0], settings.stale)
    )
    # An island scores its children one by one, then all flips of each elite that it polishes.
    costs = np.array([1] * settings.children + [problem.chips] * settings.polish)
    drive(ledger, _advance(problem, settings), start, np.tile(costs, settings.islands).cumsum())


run = Search("ga", _search, GeneticSettings)
"""Duplicates count too."""

run_memetic = Search("memetic", _search, functools.partial(GeneticSettings, polish=2))
"""`run` with two elites polished in a generation."""


@functools.cache
def _advance(problem: Problem, settings: GeneticSettings) -> Advance[_Islands]:
    return scanned(functools.partial(_generation, problem, settings))


def _generation(
    problem: Problem, settings: GeneticSettings, islands: _Islands, key: jax.Array
) -> tuple[_Islands, tuple[jax.Array, jax.Array]]:
    restart = islands.stale >= settings.stale
    keys = jax.random.split(key, 4)
    pick, points, bits, fresh = keys
    made = _children(problem, settings, islands.codes, (pick, points, bits))
    made = jnp.where(restart[:, None, None], random_chips(fresh, made.shape), made)
    flat = problem.gauge(made.reshape(-1, problem.chips))
    made = flat.reshape(made.shape)
    scores = problem.score(flat).reshape(made.shape[:2])
    elite_scores = jnp.where(restart[:, None], -jnp.inf, islands.scores)
    if settings.polish:
        better, better_scores = _polished(problem, settings, islands.codes, jax.random.fold_in(key, 1))
        made = jnp.concatenate([made, better], axis=1)
        scores = jnp.concatenate([scores, jnp.where(restart[:, None], -jnp.inf, better_scores)], axis=1)
    codes = jnp.concatenate([islands.codes, made], axis=1)
    codes, all_scores = jax.vmap(functools.partial(_survivors, settings.elites))(
        codes, jnp.concatenate([elite_scores, scores], axis=1)
    )
    improved = all_scores[:, 0] > elite_scores[:, 0]
    stale = jnp.where(improved, 0, islands.stale + 1)
    outputs = scores.reshape(-1), made.reshape(-1, problem.chips)
    return _Islands(codes, all_scores, stale), outputs


def _children(
    problem: Problem, settings: GeneticSettings, elites: jax.Array, keys: tuple[jax.Array, jax.Array, jax.Array]
) -> jax.Array:
    """int8 `[I, children, chips]` of elites `[I, K, chips]`, best first."""
    chips, count = problem.chips, settings.children
    islands, size = elites.shape[:2]
    # Elites are in order, so the smaller of two indices wins the tournament for the first parent.
    picks = jax.random.randint(keys[0], (3, islands, count), 0, size)
    rows = jnp.arange(islands)[:, None]
    first, second = elites[rows, jnp.minimum(picks[0], picks[1])], elites[rows, picks[2]]
    ends = jax.random.randint(keys[1], (2, islands, count, 1), 0, chips + 1)
    chip = jnp.arange(chips)[None, None]
    segment = (chip >= ends.min(0)) & (chip < ends.max(0))
    # One word per chip: 16 bits for mutation, one for uniform crossover. One row more per child: its own choices.
    words = random_words(keys[2], (islands, count, chips + 5))
    words, choices = words[..., :chips], words[..., chips:].astype(jnp.float32)[..., None] / 2.0**32
    mixed = choices[:, :, 0] < settings.uniform
    child = jnp.where(jnp.where(mixed, (words >> 16) & 1 == 1, segment), first, second)
    rates = jnp.asarray(settings.mutations)
    rate = rates[(choices[:, :, 1] * len(settings.mutations)).astype(jnp.int32)] / chips
    child = jnp.where((words & 0xFFFF).astype(jnp.float32) < rate * 2.0**16, -child, child)
    shifted = jnp.where(choices[:, :, 3] < 0.5, _rolled(problem, child, 1), _rolled(problem, child, -1))
    child = jnp.where(choices[:, :, 2] < settings.shift, shifted, child)
    mirrored = problem.each_sequence(child, lambda rows: rows[..., ::-1])
    return jnp.where(choices[:, :, 4] < settings.reverse, mirrored, child)


def _rolled(problem: Problem, codes: jax.Array, by: int) -> jax.Array:
    return problem.each_sequence(codes, lambda rows: jnp.roll(rows, by, -1))


def _polished(
    problem: Problem, settings: GeneticSettings, elites: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The best single flips of random elites: int8 `[I, polish, chips]` and their scores `[I, polish]`."""
    islands, size, chips = elites.shape
    picks = jax.random.randint(key, (2, islands, settings.polish), 0, size).min(0)
    codes = elites[jnp.arange(islands)[:, None], picks].reshape(-1, chips)
    scores = problem.score_flips(codes)
    flip = scores.argmax(-1)
    codes = problem.gauge(jnp.where(jnp.arange(chips)[None] == flip[:, None], -codes, codes))
    return codes.reshape(islands, -1, chips), scores.max(-1).reshape(islands, -1)


def _survivors(count: int, codes: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The `count` best distinct codes of `[n, chips]` and their scores, best first."""
    hashed = _hash(codes)
    scores, order = jax.lax.top_k(scores, scores.size)
    hashed = hashed[order]
    # Equal codes have equal scores, so they are neighbours in this order but for rare ties.
    duplicate = jnp.zeros(scores.size, jnp.bool_)
    for distance in (1, 2, 3):
        duplicate = duplicate.at[distance:].set(duplicate[distance:] | (hashed[distance:] == hashed[:-distance]))
    _, kept = jax.lax.top_k(-(jnp.arange(scores.size) + duplicate * scores.size), count)
    return codes[order[kept]], jnp.where(duplicate[kept], -jnp.inf, scores[kept])


def _hash(codes: jax.Array) -> jax.Array:
    """uint32 `[n]` of codes `[n, chips]`; a collision costs one code."""
    weights = np.random.default_rng(1).integers(1, 2**32, codes.shape[1], dtype=np.uint32)
    return jnp.where(codes < 0, jnp.asarray(weights)[None], jnp.uint32(0)).sum(-1, dtype=jnp.uint32)
