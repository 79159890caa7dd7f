"""`linear`, over whichever backend is fastest for the number of rows."""

import functools
import types

import jax
import jax.numpy as jnp

from model.kernels import target
from model.kernels.linear import cpu_ffi, xla

_BACKENDS: dict[str, types.ModuleType] = {"cpu_ffi": cpu_ffi, "xla": xla}
IMPLEMENTATIONS = tuple(_BACKENDS)


def linear(x: jax.Array, weight: jax.Array, implementation: str | None = None) -> jax.Array:
    """Multiplies rows by a weight, transposed; accumulates in float32.

    Args:
      x: `[rows, size]`, cast to the weight's dtype.
      weight: `[columns, size]`, the layout of Hugging Face checkpoints; never transposed, widened or copied.
      implementation: one of `IMPLEMENTATIONS`, or None for the fastest for these rows on this platform.

    Returns:
      float32 `[rows, columns]`. Differentiable by `jax.grad` with every implementation.

    Raises:
      NotImplementedError: the named implementation does not take this case.
    """
    return grouped_linear(x[None], weight[None], jnp.zeros(1, jnp.int32), implementation)[0]


def grouped_linear(x: jax.Array, weights: jax.Array, which: jax.Array, implementation: str | None = None) -> jax.Array:
    """`linear` of each block of rows with its own choice among several weights: the products of a mixture of experts.

    Args:
      x: `[blocks, rows, size]`, cast to the weights' dtype.
      weights: `[n, columns, size]`; only those chosen are read.
      which: int32 `[blocks]`, the weight of each block.
      implementation: as in `linear`.

    Returns:
      float32 `[blocks, rows, columns]`.
    """
    if implementation is not None and implementation not in _BACKENDS:
        raise ValueError(f"`implementation` is {implementation!r}; it must be one of {IMPLEMENTATIONS} or None.")
    x = x.astype(weights.dtype)
    if implementation is not None:
        if reason := _BACKENDS[implementation].unsupported(x, weights):
            raise NotImplementedError(f"`implementation={implementation!r}` does not take this case: {reason}")
        return _grouped(x, weights, which, implementation)
    if x.shape[1] > cpu_ffi.rows_it_wins(weights) or cpu_ffi.unsupported(x, weights):
        return _grouped(x, weights, which, "xla")
    on_cpu, elsewhere = (functools.partial(_grouped, implementation=backend) for backend in ("cpu_ffi", "xla"))
    return target.by_platform(x, weights, which, cpu=on_cpu, default=elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x: jax.Array, weights: jax.Array, which: jax.Array, implementation: str) -> jax.Array:
    return _BACKENDS[implementation].grouped_linear(x, weights, which)


def _forward(x: jax.Array, weights: jax.Array, which: jax.Array, implementation: str):
    return _grouped(x, weights, which, implementation), (x, weights, which)


def _backward(implementation: str, saved: tuple[jax.Array, jax.Array, jax.Array], gradient: jax.Array):
    x, weights, which = saved
    _, pull_back = jax.vjp(lambda x, weights: xla.grouped_linear(x, weights, which), x, weights)
    return *pull_back(gradient), None


_grouped.defvjp(_forward, _backward)
