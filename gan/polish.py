"""Local search that asks the gradient where to look: most of a neighbourhood is never evaluated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gan.ledger import Ledger
from gan.problems import Problem


@functools.partial(jax.jit, static_argnums=0)
def _gains(problem: Problem, codes: jax.Array) -> jax.Array:
    x = codes.astype(jnp.float32)
    return -2 * x * jax.grad(lambda y: problem.soft_score(y).sum())(x)


def predicted_gains(problem: Problem, codes: np.ndarray) -> np.ndarray:
    """First-order change of the soft score by flipping each chip, float32 `[B, L]` of codes int8 `[B, L]`."""
    bucket = max(16, 1 << (len(codes) - 1).bit_length())
    padded = np.concatenate([codes, np.ones((bucket - len(codes), codes.shape[1]), np.int8)])
    return np.asarray(_gains(problem, padded))[: len(codes)]


def polish(
    ledger: Ledger, codes: np.ndarray, scores: np.ndarray, flips: int, steps: int
) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Climbs from each code to a better neighbour, and on, until the neighbours tried are no better.

    A step costs one evaluation for the gradient and at most `flips` for the neighbours that it predicts to be best.

    Args:
        codes, scores: gauge-fixed int8 `[B, L]` and float32 `[B]`, as evaluated by `ledger`.

    Returns:
        The best codes and scores reached from each, and all codes evaluated on the way with their scores.
    """
    problem = ledger.problem
    flips = min(flips, problem.chips)
    codes, scores = codes.copy(), scores.copy()
    seen: list[tuple[np.ndarray, np.ndarray]] = []
    climbing = np.arange(len(codes))
    for _ in range(steps):
        if not climbing.size or ledger.spent:
            break
        gains = predicted_gains(problem, codes[climbing])
        ledger.charge_gradients(len(climbing))
        if ledger.spent:
            break
        chosen = np.argpartition(-gains, min(flips, problem.chips - 1), axis=1)[:, :flips]
        neighbours = np.repeat(codes[climbing, None], flips, axis=1)
        rows, places = np.arange(len(climbing))[:, None], np.arange(flips)[None]
        neighbours[rows, places, chosen] *= -1
        neighbours = problem.gauge(neighbours.reshape(-1, problem.chips))
        found = ledger.evaluate(neighbours)
        seen.append((neighbours, found))
        found = found.reshape(-1, flips)
        best = found.argmax(1)
        reached = found[np.arange(len(climbing)), best]
        better = reached > scores[climbing]
        climbing, reached = climbing[better], reached[better]
        codes[climbing] = neighbours.reshape(-1, flips, problem.chips)[better, best[better]]
        scores[climbing] = reached
    return codes, scores, seen
