"""The rotary embedding: what it means, and what it costs."""

import jax
import jax.numpy as jnp
import numpy as np

from model.config import RopeConfig
from model.rope import rotary, rotate


def test_scores_depend_on_distances_only(rng: np.random.Generator) -> None:
    q, k = jnp.asarray(rng.standard_normal((2, 1, 1, 64)), jnp.float32)

    def score(query: int, key: int) -> jax.Array:
        at = (rotary(RopeConfig(), 64, jnp.asarray([position])) for position in (query, key))
        return jnp.vdot(*(rotate(x, cos_sin) for x, cos_sin in zip((q, k), at, strict=True)))

    np.testing.assert_allclose(score(5, 2), score(1005, 1002), atol=2e-3)  # angles of 1000 have 1e-4 of error
    np.testing.assert_allclose(score(7, 7), jnp.vdot(q, k), rtol=1e-5, atol=1e-5)


def test_cosines_are_taken_once_for_all_layers() -> None:
    """XLA:CPU by itself takes them again wherever they are used, for every head of every layer."""

    def layers(x: jax.Array, positions: jax.Array) -> jax.Array:
        cos_sin = rotary(RopeConfig(), 64, positions)
        for _ in range(4):
            x = jnp.einsum("thd,de->the", rotate(x, cos_sin), jnp.ones((64, 64)))
        return x

    compiled = jax.jit(layers).lower(jnp.ones((8, 2, 64)), jnp.arange(8)).compile().as_text()
    assert compiled is not None
    assert compiled.count(" cosine(") == compiled.count(" sine(") == 1
