"""`convert`: from a step and the roles of its arguments to slices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from attention_offload.converter.cut import levels, place
from attention_offload.converter.errors import ConversionError
from attention_offload.converter.normalise import normalise
from attention_offload.converter.roles import Role, role_leaves
from attention_offload.converter.slices import slices_of
from attention_offload.converter.split_step import SplitStep


def convert(step: Callable[..., Any], roles: Sequence[Any], *shapes: Any) -> SplitStep:
    """Cuts `step` into slices that compute the same, with the fewest bytes crossing between the two sides.

    Args:
        step: any function of arrays that JAX can trace.
        roles: one tree of `Role` per positional argument; a role stands for all leaves below it.
        shapes: the step's arguments, or `jax.ShapeDtypeStruct`s in their place.

    Raises:
        ConversionError: no argument is KV, or something cannot be cut; the message names the equation.
    """
    leaves = role_leaves(roles, shapes)
    if Role.KV not in leaves:
        raise ConversionError("No argument has Role.KV, so there is no attention to move; name the caches.")
    traced, out_shape = jax.make_jaxpr(step, return_shape=True)(*shapes)
    program = normalise(traced, leaves)
    sides = place(program)
    slices, executables = slices_of(program, sides, levels(program, sides))
    return SplitStep(
        program=program,
        slices=tuple(slices),
        executables=tuple(executables),
        in_tree=jax.tree.structure(shapes),
        out_tree=jax.tree.structure(out_shape),
    )
