"""What the classical searches share: random words, and the loop that moves a device state under a ledger."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gan.ledger import Ledger

State = TypeVar("State")

# Steps of a search between two looks of the host.
CHUNK = 16


def random_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32 words, good enough for search: two rounds of a bijective hash of a counter, under the words of the key.

    JAX's generators take 20 ns a word on a CPU, which would be most of a search; this takes about 1 ns.
    """
    secret = jax.random.bits(key, (2,), jnp.uint32)
    words = jax.lax.iota(jnp.uint32, math.prod(shape))
    for round_ in range(2):
        words = words + secret[round_]
        words = (words ^ (words >> 16)) * jnp.uint32(0x7FEB352D)
        words = (words ^ (words >> 15)) * jnp.uint32(0x846CA68B)
        words = words ^ (words >> 16)
    return words.reshape(shape)


def random_chips(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Uniform +1 and -1, int8."""
    return 1 - 2 * (random_words(key, shape) >> 31).astype(jnp.int8)


def chain_count(steps: int, least: int) -> int:
    """How many chains share `steps` steps when each needs at least `least`: 1 to 1024."""
    return max(1, min(1024, steps // least))


# (state, key) -> ((state, key), (scores, codes))
Advance = Callable[[tuple[State, jax.Array]], tuple[tuple[State, jax.Array], tuple[jax.Array, jax.Array]]]


def drive(ledger: Ledger, advance: Advance[State], state: State, costs: np.ndarray) -> None:
    """Advances a search from `state`, under the ledger's seed, until the ledger is spent.

    `advance` makes some steps and returns the next state with scores float32 `[steps, n]` and codes int8
    `[steps, n, chips]` worth keeping. `costs` int `[n]` are the evaluations that a step has made when each of its codes
    is known, ascending; the last is the cost of the step.
    """
    carry = state, jax.random.key(ledger.seed)
    while not ledger.spent:
        carry, outputs = advance(carry)
        scores, codes = (np.asarray(output) for output in outputs)
        ledger.charge(costs, codes, scores)


def scanned(step: Callable[[State, jax.Array], tuple[State, Any]]) -> Advance[State]:
    """`advance` for `drive`, whose state is `(state, key)`: a jitted scan of `step` over `CHUNK` keys.

    A step takes `(state, key)` and returns `(state, (scores, codes))`.
    """

    @jax.jit
    def advance(carry: tuple[State, jax.Array]) -> Any:
        state, key = carry
        key, chunk_key = jax.random.split(key)
        state, outputs = jax.lax.scan(step, state, jax.random.split(chunk_key, CHUNK))
        return (state, key), outputs

    return advance
