"""`linear` by XLA's matrix product, in the one spelling that is fast on CPU."""

import jax
import jax.numpy as jnp
from jax import lax


def unsupported(x: jax.Array, weights: jax.Array) -> str | None:
    """XLA takes every case."""
    del x, weights


def grouped_linear(x: jax.Array, weights: jax.Array, which: jax.Array) -> jax.Array:
    """float32 `[blocks, rows, columns]` of `x` `[blocks, rows, size]` and `weights` `[n, columns, size]`."""
    if weights.shape[0] == 1:
        return _product(x.reshape(-1, x.shape[-1]), weights[0]).reshape(*x.shape[:2], -1)
    return lax.map(lambda block: _product(block[0], weights[block[1]]), (x, which))


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 `[rows, columns]` of `x` `[rows, size]` and `weight` `[columns, size]`.

    No transpose and no upcast of the weight, and never a bfloat16 matrix-vector product: XLA:CPU converts the whole
    weight to float32 for that one, so a single row is doubled.
    """
    rows = x.shape[0]
    if rows == 1 and weight.dtype == jnp.bfloat16:
        x = lax.optimization_barrier(jnp.concatenate([x, x]))
    out = lax.dot_general(x, weight, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    return out[:rows]
