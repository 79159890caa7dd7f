"""The pieces of a cut step, and the programs behind them: equal pieces of different layers share one."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from attention_offload.converter.executable import Executable
from attention_offload.converter.program import Constant, Equation, Operand, Program, aval_key, params_key
from attention_offload.converter.roles import Side


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """What one side runs between two crossings.

    Attributes:
        side: which side.
        level: crossings before it; its place among the slices.
        executable: index into `SplitStep.executables`.
        inputs: operands in the order of the executable's parameters: values, and scalars that differ between slices.
        outputs: values in the order of the executable's results.
    """

    side: Side
    level: int
    executable: int
    inputs: tuple[Operand, ...]
    outputs: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Piece:
    """Equations of one level before equal ones are found; `inputs` and `outputs` are values of the program."""

    side: Side
    level: int
    equations: tuple[Equation, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def slices_of(program: Program, sides: Sequence[Side], levels: Sequence[int]) -> tuple[list[Slice], list[Executable]]:
    """The slices of a placed step in the order in which they run, and the executables that they share.

    What is made from free arguments alone is computed once by the first dense slice for all dense slices (angles of
    RoPE), and by each attention slice for itself (indices).
    """
    pieces = _pieces(program, sides, levels)
    groups: dict[Any, list[_Piece]] = {}
    for piece in pieces:
        groups.setdefault(_shape_key(program, piece), []).append(piece)
    executables, made = [], {}
    for group in groups.values():
        lifted = _differing(group)
        for piece in group:
            constants = _constants(piece)
            extra = tuple(constants[place] for place in lifted)
            made[piece.level] = Slice(
                side=piece.side,
                level=piece.level,
                executable=len(executables),
                inputs=(*piece.inputs, *extra),
                outputs=piece.outputs,
            )
        executables.append(_executable(group[0], lifted))
    return [made[piece.level] for piece in pieces], executables


def _pieces(program: Program, sides: Sequence[Side], levels: Sequence[int]) -> list[_Piece]:
    free = program.free
    last = max(levels, default=0)
    own: list[list[Equation]] = [[] for _ in range(last + 1)]
    makers = {
        v: equation for equation in program.equations if free.issuperset(equation.outputs) for v in equation.outputs
    }
    for equation, level in zip(program.equations, levels, strict=True):
        if not free.issuperset(equation.outputs):
            own[level].append(equation)
    made_free = free - set(program.inputs)
    results = {output for output in program.outputs if isinstance(output, int)}
    # Free values that dense slices take from the first one, and results that are made from free arguments alone.
    hoisted = {v for level in range(2, last + 1, 2) for e in own[level] for v in e.values if v in made_free}
    hoisted |= results & made_free
    pieces: list[_Piece] = []
    used_later = results | hoisted
    for level in reversed(range(last + 1)):
        equations = own[level]
        wanted = [value for equation in equations for value in equation.values if value in made_free]
        if level == 0:
            wanted += sorted(hoisted)
        helpers = [] if level and level % 2 == 0 else _closure(makers, wanted)
        whole = [*helpers, *equations]
        made = dict.fromkeys(value for equation in whole for value in equation.outputs)
        inputs = tuple(dict.fromkeys(v for equation in whole for v in equation.values if v not in made))
        # Of what helpers make, only the first dense slice hands anything on.
        helped = {value for equation in helpers for value in equation.outputs}
        outputs = tuple(v for v in made if v in used_later and (v not in helped or level == 0))
        pieces.append(_Piece(side=Side(level % 2), level=level, equations=tuple(whole), inputs=inputs, outputs=outputs))
        used_later = used_later | set(inputs)
    return pieces[::-1]


def _closure(makers: Mapping[int, Equation], wanted: Iterable[int]) -> list[Equation]:
    """The free equations behind `wanted`, in an order that follows from their use alone.

    The trace has one of each, wherever it first asked for it; in that order equal slices would not look equal.
    """
    kept: dict[int, Equation] = {}

    def add(value: int) -> None:
        equation = makers.get(value)
        if equation is not None and id(equation) not in kept:
            for operand in equation.values:
                add(operand)
            kept[id(equation)] = equation

    for value in wanted:
        add(value)
    return list(kept.values())


def _numbers(piece: _Piece) -> dict[int, int]:
    """Local numbers of a piece's values: parameters first, then results of its equations in order."""
    made = (value for equation in piece.equations for value in equation.outputs)
    return {value: number for number, value in enumerate([*piece.inputs, *made])}


def _constants(piece: _Piece) -> list[Constant]:
    """Constants of a piece, by place."""
    return [operand for equation in piece.equations for operand in equation.inputs if isinstance(operand, Constant)]


def _liftable(constant: Constant) -> bool:
    """Whether a constant can become a parameter: an integer scalar, such as the first page of a layer."""
    return not constant.aval.shape and np.issubdtype(constant.aval.dtype, np.integer)


def _shape_key(program: Program, piece: _Piece) -> Any:
    """Equal for pieces that differ in values and liftable constants alone."""
    numbers = _numbers(piece)

    def operand_key(operand: Operand) -> Any:
        if isinstance(operand, int):
            return numbers[operand]
        return aval_key(operand.aval), None if _liftable(operand) else np.asarray(operand.value).tobytes()

    return (
        piece.side,
        tuple(aval_key(program.avals[value]) for value in piece.inputs),
        tuple(
            (equation.primitive.name, params_key(equation.params), tuple(map(operand_key, equation.inputs)))
            for equation in piece.equations
        ),
        tuple(numbers[value] for value in piece.outputs),
    )


def _differing(group: Sequence[_Piece]) -> list[int]:
    """Places of the constants that are not the same in all of these pieces."""
    columns = zip(*(_constants(piece) for piece in group), strict=True)
    return [
        place
        for place, column in enumerate(columns)
        if len({np.asarray(constant.value).tobytes() for constant in column}) > 1
    ]


def _executable(piece: _Piece, lifted: Sequence[int]) -> Executable:
    numbers = _numbers(piece)
    # Parameters for lifted constants come behind those for values, so everything made moves up by as many.
    shift = len(lifted)
    local = {v: n if n < len(piece.inputs) else n + shift for v, n in numbers.items()}
    parameter = {place: len(piece.inputs) + index for index, place in enumerate(lifted)}
    place = 0
    equations = []
    for equation in piece.equations:
        operands: list[Operand] = []
        for operand in equation.inputs:
            if isinstance(operand, int):
                operands.append(local[operand])
            else:
                operands.append(parameter.get(place, operand))
                place += 1
        outputs = tuple(local[value] for value in equation.outputs)
        equations.append(Equation(equation.primitive, equation.params, tuple(operands), outputs))
    outputs = tuple(local[value] for value in piece.outputs)
    return Executable(tuple(equations), len(piece.inputs) + shift, outputs)
