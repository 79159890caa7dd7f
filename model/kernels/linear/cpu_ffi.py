"""`linear` for few rows on CPUs with AVX-512 or AVX2, by the C++ kernel of `cpu_kernels.cc`."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from model.kernels.paged_attention import cpu_library
from model.kernels.paged_attention.manual import result_type, vary_alike

# Elements per line of the caches: a row of the weight holds whole lines.
_LANES = {"float32": 16, "bfloat16": 32}


def rows_it_wins(weights: jax.Array) -> int:
    """The most rows (of a block) for which this backend is faster than XLA's matrix product (model/NOTES.md)."""
    widest = cpu_library.multiplies_bfloat16 if weights.dtype == jnp.bfloat16 else cpu_library.has_avx512
    if widest():
        return 128
    return 64 if weights.shape[0] > 1 else 16  # XLA copies a weight out of several, on jax 0.10 all of them


def unsupported(x: jax.Array, weights: jax.Array) -> str | None:
    """Why this backend cannot take the case, or None."""
    lanes = _LANES.get(weights.dtype.name)
    if lanes is None:
        return f"the weight is {weights.dtype}; it must be one of {', '.join(_LANES)}."
    if x.shape[-1] % lanes:
        return f"size is {x.shape[-1]}; for {weights.dtype} it must be a multiple of {lanes}."
    mesh = jax.typeof(weights).sharding.mesh
    if mesh.size > 1 and any(kind != AxisType.Manual for kind in mesh.axis_types):
        return f"the weight lies on a mesh {dict(mesh.shape)}, over which XLA cannot divide an opaque call."
    return cpu_library.unavailable()


def grouped_linear(x: jax.Array, weights: jax.Array, which: jax.Array) -> jax.Array:
    """float32 `[blocks, rows, columns]` of `x` `[blocks, rows, size]` and `weights` `[n, columns, size]`."""
    x, weights, which = vary_alike(x, weights, which)
    out = result_type((*x.shape[:2], weights.shape[1]), jnp.dtype(jnp.float32), like=x)
    return jax.ffi.ffi_call("halfmoon_linear", out, vmap_method="sequential")(x, weights, which)
