"""`linear`, over whichever backend is fastest for the number of rows."""

import functools
import types

import jax
import jax.numpy as jnp
from jax import lax

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
    if implementation is not None and implementation not in _BACKENDS:
        raise ValueError(f"`implementation` is {implementation!r}; it must be one of {IMPLEMENTATIONS} or None.")
    x = x.astype(weight.dtype)
    if implementation is not None:
        if reason := _BACKENDS[implementation].unsupported(x, weight):
            raise NotImplementedError(f"`implementation={implementation!r}` does not take this case: {reason}")
        return _linear(x, weight, implementation)
    if x.shape[0] > cpu_ffi.rows_it_wins(weight.dtype) or cpu_ffi.unsupported(x, weight):
        return _linear(x, weight, "xla")
    if jax.default_backend() == "cpu":
        return _linear(x, weight, "cpu_ffi")
    on = {"cpu": "cpu_ffi", "default": "xla"}
    branches = {name: functools.partial(_linear, implementation=backend) for name, backend in on.items()}
    return lax.platform_dependent(x, weight, **branches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, weight: jax.Array, implementation: str) -> jax.Array:
    return _BACKENDS[implementation].linear(x, weight)


def _forward(x: jax.Array, weight: jax.Array, implementation: str):
    return _linear(x, weight, implementation), (x, weight)


def _backward(implementation: str, saved: tuple[jax.Array, jax.Array], gradient: jax.Array):
    x, weight = saved
    gradient = gradient.astype(weight.dtype)
    dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
    to_x = dot(gradient, weight, (((1,), (0,)), ((), ())))
    to_weight = dot(gradient, x, (((0,), (0,)), ((), ())))
    return to_x.astype(x.dtype), to_weight.astype(weight.dtype)


_linear.defvjp(_forward, _backward)
