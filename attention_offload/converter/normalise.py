"""From a traced step to a `Program`: whatever mixes weights and KV is inlined or unrolled, until no equation does.

Calls (jit, remat) that mix both are inlined, and custom derivatives always, for their parameters hold addresses of
functions by which equal slices would differ. Loops that mix both are unrolled. Whatever touches only one of the two
stays whole: a jitted attention kernel is one equation on the attention side.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core

from attention_offload.converter.errors import ConversionError
from attention_offload.converter.program import Constant, Equation, Operand, Program, aval_key, nbytes, params_key
from attention_offload.converter.roles import Role

_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2")
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")
_BODIES = ("jaxpr", "call_jaxpr", "fun_jaxpr")
# A constant up to this size may be on both sides; a larger one is a weight that was not named.
_LARGEST_CONSTANT_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class _Kind:
    """What a value is made of.

    Attributes:
        free: of free arguments and constants alone.
        weight: of weights (and what is free) alone, at least one.
        pool: a KV argument, or as large as one and made from it.
    """

    free: bool = False
    weight: bool = False
    pool: bool = False


def normalise(traced: core.ClosedJaxpr, roles: Sequence[Role]) -> Program:
    """Flattens a traced step.

    Args:
        traced: from `jax.make_jaxpr`.
        roles: one per argument.

    Raises:
        ConversionError: the step closes over a large array, or branches on or loops over weights and KV together.
    """
    builder = _Builder()
    jaxpr = traced.jaxpr
    kinds = {
        Role.WEIGHT: _Kind(weight=True),
        Role.KV: _Kind(pool=True),
        Role.FREE: _Kind(free=True),
        Role.ACTIVATION: _Kind(),
    }
    inputs = tuple(builder.value(var.aval, kinds[role]) for var, role in zip(jaxpr.invars, roles, strict=True))
    outputs = tuple(builder.inline(jaxpr, builder.constants(traced), inputs))
    return Program(
        avals=builder.avals, inputs=inputs, roles=tuple(roles), equations=tuple(builder.equations), outputs=outputs
    ).live()


class _Builder:
    """Numbers values and collects equations."""

    def __init__(self) -> None:
        self.avals: list[Any] = []
        self.equations: list[Equation] = []
        self._kinds: list[_Kind] = []
        # Outputs of free equations by what they compute: every layer asks for the same angles, which are taken once.
        self._known: dict[Any, tuple[int, ...]] = {}

    def value(self, aval: Any, kind: _Kind) -> int:
        self.avals.append(aval)
        self._kinds.append(kind)
        return len(self.avals) - 1

    def constants(self, closed: core.ClosedJaxpr) -> list[Operand]:
        """Arrays that a function closes over."""
        return [
            self._constant(const, var.aval) for const, var in zip(closed.consts, closed.jaxpr.constvars, strict=True)
        ]

    def _constant(self, value: Any, aval: Any) -> Constant:
        if nbytes(aval) > _LARGEST_CONSTANT_BYTES:
            raise ConversionError(
                f"The step closes over an array {aval.str_short()} of {nbytes(aval)} bytes; pass it as an argument, so "
                "that its role can be named."
            )
        return Constant(value, aval)

    def inline(self, jaxpr: core.Jaxpr, consts: Sequence[Operand], operands: Sequence[Operand]) -> list[Operand]:
        """Adds a function's equations, applied to `operands`; returns what it returns."""
        names: dict[Any, Operand] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *operands], strict=True))

        def read(atom: Any) -> Operand:
            return self._constant(atom.val, atom.aval) if isinstance(atom, core.Literal) else names[atom]

        for equation in jaxpr.eqns:
            results = self._apply(equation, [read(atom) for atom in equation.invars])
            names.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _apply(self, equation: Any, operands: list[Operand]) -> list[Operand]:
        name, params = equation.primitive.name, equation.params
        mixes = self._mixes(operands)
        if name in _CUSTOM or (name in _CALLS and mixes):
            return self._call(equation, operands)
        if mixes and name == "scan":
            return self._unroll(equation, operands)
        if mixes and any(key in params for key in ("branches", "cond_jaxpr", "body_jaxpr")):
            raise ConversionError(
                f"`{name}` takes weights and KV together, so neither side can run it. Decide outside of the step, or "
                "write the layers out."
            )
        return self._emit(equation.primitive, params, operands, [var.aval for var in equation.outvars])

    def _call(self, equation: Any, operands: list[Operand]) -> list[Operand]:
        body = next(equation.params[key] for key in _BODIES if key in equation.params)
        if isinstance(body, core.ClosedJaxpr):
            return self.inline(body.jaxpr, self.constants(body), operands)
        return self.inline(body, (), operands)

    def _emit(
        self, primitive: Any, params: dict[str, Any], operands: Sequence[Operand], avals: Sequence[Any]
    ) -> list[Operand]:
        kind = self._kind_of(operands)
        key = None
        if kind.free:
            key = primitive.name, params_key(params), tuple(_operand_key(operand) for operand in operands)
            if key in self._known:
                return list(self._known[key])
        pools = [o for o in operands if isinstance(o, int) and self._kinds[o].pool]
        largest = max((nbytes(self.avals[o]) for o in pools), default=None)
        outputs = tuple(
            self.value(aval, dataclasses.replace(kind, pool=largest is not None and nbytes(aval) >= largest))
            for aval in avals
        )
        self.equations.append(Equation(primitive, params, tuple(operands), outputs))
        if key is not None:
            self._known[key] = outputs
        return list(outputs)

    def _unroll(self, equation: Any, operands: list[Operand]) -> list[Operand]:
        """Writes a scan out, one call of its body after the other."""
        params = equation.params
        body, length = params["jaxpr"], params["length"]
        # Only what a scan goes over has one dimension more than in its body; versions of JAX name the counts otherwise.
        carry = _of_equal_rank(equation.outvars, body.jaxpr.outvars)
        consts = _of_equal_rank(equation.invars, body.jaxpr.invars) - carry
        fixed, state, stacked = operands[:consts], operands[consts : consts + carry], operands[consts + carry :]
        rows: list[list[Operand]] = [[] for _ in equation.outvars[carry:]]
        for step in reversed(range(length)) if params["reverse"] else range(length):
            items = [self._traced(_item, operand, Constant(np.int32(step), _INDEX)) for operand in stacked]
            results = self.inline(body.jaxpr, self.constants(body), [*fixed, *state, *items])
            state = results[:carry]
            for row, result in zip(rows, results[carry:], strict=True):
                row.append(result)
        if params["reverse"]:
            rows = [row[::-1] for row in rows]
        return [*state, *(self._traced(_stack, *row) for row in rows)]

    def _traced(self, function: Callable[..., jax.Array], *operands: Operand) -> Operand:
        """Adds the equations of a function of arrays."""
        avals = [self.avals[o] if isinstance(o, int) else o.aval for o in operands]
        shapes = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in avals]
        closed = jax.make_jaxpr(function)(*shapes)
        return self.inline(closed.jaxpr, self.constants(closed), operands)[0]

    def _kind_of(self, operands: Sequence[Operand]) -> _Kind:
        kinds = [self._kinds[operand] for operand in operands if isinstance(operand, int)]
        if all(kind.free for kind in kinds):
            return _Kind(free=True)
        return _Kind(weight=all(kind.free or kind.weight for kind in kinds))

    def _is(self, operand: Operand, attribute: str) -> bool:
        return isinstance(operand, int) and getattr(self._kinds[operand], attribute)

    def _mixes(self, operands: Sequence[Operand]) -> bool:
        return any(self._is(o, "pool") for o in operands) and any(self._is(o, "weight") for o in operands)


_INDEX = jax.make_jaxpr(lambda i: i)(jax.ShapeDtypeStruct((), np.int32)).in_avals[0]


def _of_equal_rank(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(len(one.aval.shape) == len(other.aval.shape) for one, other in zip(outside, inside, strict=True))


def _item(stacked: jax.Array, index: jax.Array) -> jax.Array:
    """One entry along the first axis; a dynamic index, so that slices of different layers are one program."""
    starts = (index, *(np.int32(0) for _ in stacked.shape[1:]))
    return lax.squeeze(lax.dynamic_slice(stacked, starts, (1, *stacked.shape[1:])), (0,))


def _stack(*rows: jax.Array) -> jax.Array:
    return lax.concatenate([lax.expand_dims(row, (0,)) for row in rows], 0)


def _operand_key(operand: Operand) -> Any:
    if isinstance(operand, int):
        return operand
    return aval_key(operand.aval), np.asarray(operand.value).tobytes()
