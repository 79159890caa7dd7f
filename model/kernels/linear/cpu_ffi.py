"""`linear` for few rows on AVX-512 CPUs, by the C++ kernel of `cpu_kernels.cc`."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from model.kernels.paged_attention import cpu_library
from model.kernels.paged_attention.manual import result_type, vary_alike

# Elements per 512-bit vector: a row of the weight holds whole vectors.
_LANES = {"float32": 16, "bfloat16": 32}


def rows_it_wins(dtype: jnp.dtype) -> int:
    """The most rows for which this backend is faster than XLA's matrix product (model/NOTES.md)."""
    if dtype == jnp.bfloat16:
        return 128 if cpu_library.has_amx() else 8
    return 32


def unsupported(x: jax.Array, weight: jax.Array) -> str | None:
    """Why this backend cannot take the case, or None."""
    lanes = _LANES.get(weight.dtype.name)
    if lanes is None:
        return f"the weight is {weight.dtype}; it must be one of {', '.join(_LANES)}."
    if x.shape[-1] % lanes:
        return f"size is {x.shape[-1]}; for {weight.dtype} it must be a multiple of {lanes}."
    mesh = jax.typeof(weight).sharding.mesh
    if mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types):
        return f"the weight lies on a mesh {dict(mesh.shape)}, over which XLA cannot divide an opaque call."
    return cpu_library.unavailable()


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 `[rows, columns]` of `x` `[rows, size]` and `weight` `[columns, size]` of one dtype."""
    x, weight = vary_alike(x, weight)
    out = result_type((x.shape[0], weight.shape[0]), jnp.dtype(jnp.float32), like=x)
    return jax.ffi.ffi_call("halfmoon_linear", out, vmap_method="sequential")(x, weight)
