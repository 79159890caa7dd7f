"""A step as a flat list of equations over numbered values: what a trace becomes before it is cut."""

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core

from attention_offload.converter.roles import Role

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@dataclasses.dataclass(frozen=True, slots=True)
class Constant:
    """A scalar or array that is written into the step itself."""

    value: Any
    aval: Any


# A value by its number, or a constant.
Operand = int | Constant


@dataclasses.dataclass(frozen=True, slots=True)
class Equation:
    """One primitive, applied to operands; `outputs` are numbers of values."""

    primitive: Any
    params: Mapping[str, Any]
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The primitive's name, with that of the function that it calls."""
        called = self.params.get("name")
        return f"{self.primitive.name}[{called}]" if isinstance(called, str) else self.primitive.name

    @property
    def values(self) -> list[int]:
        """Numbers of the operands that are values, each once, in order."""
        return list(dict.fromkeys(operand for operand in self.inputs if isinstance(operand, int)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A step.

    Attributes:
        avals: shape and dtype of each value.
        inputs: values of the step's arguments; `roles` says what they are.
        equations: in an order in which they can run.
        outputs: what the step returns.
    """

    avals: Sequence[Any]
    inputs: tuple[int, ...]
    roles: tuple[Role, ...]
    equations: tuple[Equation, ...]
    outputs: tuple[Operand, ...]

    @functools.cached_property
    def free(self) -> frozenset[int]:
        """Values that both sides can make for themselves: free arguments, and what is made from these alone."""
        free = set(self.input_of(Role.FREE))
        for equation in self.equations:
            if free.issuperset(equation.values):
                free.update(equation.outputs)
        return frozenset(free)

    @functools.cached_property
    def kv_outputs(self) -> frozenset[int]:
        """Results that are caches: made from a KV argument of the same shape and dtype."""
        from_kv = {value: {value} for value in self.input_of(Role.KV)}
        for equation in self.equations:
            sources = set().union(*(from_kv.get(value, ()) for value in equation.values))
            from_kv |= dict.fromkeys(equation.outputs, sources)
        results = {output for output in self.outputs if isinstance(output, int)}
        return frozenset(output for output in results if any(self.alike(output, kv) for kv in from_kv.get(output, ())))

    def alike(self, one: int, other: int) -> bool:
        """Whether two values have the same shape and dtype."""
        return (self.avals[one].shape, self.avals[one].dtype) == (self.avals[other].shape, self.avals[other].dtype)

    def nbytes(self, value: int) -> int:
        """Bytes of one value."""
        return nbytes(self.avals[value])

    def input_of(self, role: Role) -> list[int]:
        """Arguments of one role."""
        return [value for value, its in zip(self.inputs, self.roles, strict=True) if its is role]

    def live(self) -> "Program":
        """Returns the same step with those equations only that an output depends on."""
        needed = {operand for operand in self.outputs if isinstance(operand, int)}
        kept = []
        for equation in reversed(self.equations):
            if needed.intersection(equation.outputs):
                kept.append(equation)
                needed.update(equation.values)
        return dataclasses.replace(self, equations=tuple(reversed(kept)))


def nbytes(aval: Any) -> int:
    """Bytes of an array of that shape and dtype; a PRNG key counts by its words."""
    itemsize = getattr(aval.dtype, "itemsize", 8)
    return int(np.prod(aval.shape, dtype=np.int64)) * itemsize


def run(equations: Iterable[Equation], values: dict[int, Any]) -> None:
    """Evaluates `equations` over `values`, which holds their inputs and takes their outputs. Works while tracing."""
    for equation in equations:
        operands = [values[o] if isinstance(o, int) else o.value for o in equation.inputs]
        params = equation.primitive.get_bind_params(dict(equation.params))
        results = equation.primitive.bind(*operands, **params)
        if not equation.primitive.multiple_results:
            results = [results]
        values.update(zip(equation.outputs, results, strict=True))


def params_key(params: Mapping[str, Any]) -> str:
    """Equal for equations that compute the same: parameters in print, without addresses of Python functions."""
    parts = [f"{name}={_printed(params[name])}" for name in sorted(params)]
    return _ADDRESS.sub("", ";".join(parts))


def _printed(value: Any) -> str:
    # A jaxpr in print hides the constants that it closes over.
    consts = value.consts if isinstance(value, core.ClosedJaxpr) else ()
    return f"{value!s}{[id(const) for const in consts]}" if consts else str(value)


def aval_key(aval: Any) -> tuple[Any, ...]:
    """Shape, dtype and weak type."""
    return aval.shape, str(aval.dtype), bool(getattr(aval, "weak_type", False))


def shape_text(aval: Any) -> str:
    """`float32[8,64]`."""
    return f"{jax.numpy.dtype(aval.dtype).name}[{','.join(map(str, aval.shape))}]"
