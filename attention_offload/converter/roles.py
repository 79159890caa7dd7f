"""What each argument of a step is to the converter, and the two sides that a step is cut into."""

import enum
from collections.abc import Sequence
from typing import Any

import jax

from attention_offload.converter.errors import ConversionError


class Side(enum.Enum):
    """Where an equation runs: on the devices with the weights, or on the devices with the KV."""

    DENSE = 0
    ATTENTION = 1


class Role(enum.Enum):
    """What an argument of a step is.

    Attributes:
        WEIGHT: a parameter of the model; stays on the dense side.
        KV: a cache; stays on the attention side.
        FREE: positions, page tables and other indices, known to both sides before the step begins.
        ACTIVATION: all else, such as token ids; enters on the dense side.
    """

    WEIGHT = "weight"
    KV = "kv"
    FREE = "free"
    ACTIVATION = "activation"


def role_leaves(roles: Sequence[Any], args: Sequence[Any]) -> list[Role]:
    """One role per array in `args`.

    Args:
        roles: one tree of roles per positional argument; a role stands for all leaves below it.
        args: the positional arguments of the step.

    Raises:
        ConversionError: there are not as many trees of roles as arguments, or one is no prefix of its argument.
    """
    if len(roles) != len(args):
        raise ConversionError(f"{len(roles)} roles for {len(args)} arguments; give one tree of roles per argument.")
    leaves: list[Role] = []
    for index, (role, arg) in enumerate(zip(roles, args, strict=True)):
        try:
            spread = jax.tree.map(
                lambda one, part: jax.tree.map(lambda _: one, part), role, arg, is_leaf=lambda x: isinstance(x, Role)
            )
        except (ValueError, TypeError) as error:
            raise ConversionError(f"The roles of argument {index} are no prefix of its tree: {error}") from error
        leaves += jax.tree.leaves(spread)
    if wrong := [role for role in leaves if not isinstance(role, Role)]:
        raise ConversionError(f"{wrong[0]!r} is no role; use Role.WEIGHT, KV, FREE or ACTIVATION.")
    return leaves
