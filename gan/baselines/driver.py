"""What the searches share: the signature that scripts call, and the loop that moves a device state under a ledger."""

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from gan.ledger import Ledger, Progress, SearchResult
from gan.problems import Problem

State = TypeVar("State")

# Steps of a search between two looks of the host.
CHUNK = 16


class Search(Protocol):
    """A search method: `run` of every module here, and HpGAN's own."""

    def __call__(
        self,
        problem: Problem,
        budget: int,
        seed: int,
        progress: Progress | None = None,
        *,
        stop_at: float | None = None,
    ) -> SearchResult:
        """Searches until `budget` evaluations are spent or a score reaches `stop_at`."""
        ...


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


def drive(ledger: Ledger, advance: Advance[State], state: State, evaluations: int) -> SearchResult:
    """Advances a search from `state`, under the ledger's seed, until the ledger is spent.

    `advance` makes some steps of `evaluations` evaluations each, and returns the next state with scores
    float32 `[steps, n]` and codes int8 `[steps, n, chips]` worth keeping.
    """
    carry = state, jax.random.key(ledger.seed)
    while not ledger.spent:
        carry, outputs = advance(carry)
        scores, codes = (np.asarray(output) for output in outputs)
        ledger.charge(evaluations, codes, scores)
    return ledger.result()


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
