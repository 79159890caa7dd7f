"""Opaque calls inside `shard_map`: JAX cannot see how their results vary over the mesh, so they must say it."""

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, each marked as varying over every manual mesh axis over which one of them varies."""
    axes = frozenset().union(*(jax.typeof(array).manual_axis_type.varying for array in arrays))
    marked = []
    for array in arrays:
        missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
        marked.append(lax.pcast(array, missing, to="varying") if missing else array)
    return tuple(marked)


def result_type(shape: tuple[int, ...], dtype, like: jax.Array) -> jax.ShapeDtypeStruct:
    """The type of a call's result that varies over the mesh as `like` does."""
    known = jax.typeof(like)
    if not known.manual_axis_type.varying:
        return jax.ShapeDtypeStruct(shape, dtype)
    here = NamedSharding(known.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=here, manual_axis_type=known.manual_axis_type)
