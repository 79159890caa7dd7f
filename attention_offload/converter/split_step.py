"""A step in pieces: composed they are the step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from attention_offload.converter.errors import ConversionError
from attention_offload.converter.executable import Executable
from attention_offload.converter.program import Constant, Program, nbytes, shape_text
from attention_offload.converter.roles import Role, Side
from attention_offload.converter.slices import Slice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crossing:
    """What goes from one slice's side to the other before slice `level` can run.

    Attributes:
        level: of the first slice that needs it.
        to: the side that it goes to.
        values: of the program; `shapes` are theirs.
        nbytes: of all of them.
    """

    level: int
    to: Side
    values: tuple[int, ...]
    shapes: tuple[str, ...]
    nbytes: int


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class SplitStep:
    """Dense slices (even levels) and attention slices (odd levels) of one step.

    Attributes:
        program: the step before it was cut.
        slices: in the order in which they run.
        executables: the different functions among them.
    """

    program: Program
    slices: tuple[Slice, ...]
    executables: tuple[Executable, ...]
    in_tree: Any
    out_tree: Any

    def __call__(self, *args: Any) -> Any:
        """Runs all slices where the arguments are; bit for bit what the step returns, where XLA fuses both alike."""
        return self.run([jax.jit(executable) for executable in self.executables], args)

    def run(self, functions: Sequence[Callable[..., Sequence[Any]]], args: Sequence[Any]) -> Any:
        """Runs all slices in order by `functions`, which compute what `executables` do, one for each."""
        values = self.bind(args)
        for piece in self.slices:
            results = functions[piece.executable](*self.operands(piece, values))
            values.update(zip(piece.outputs, results, strict=True))
        return self.result(values)

    def bind(self, args: Sequence[Any]) -> dict[int, Any]:
        """The step's arguments by value. Raises ConversionError if their structure is not that of the conversion."""
        leaves, tree = jax.tree.flatten(tuple(args))
        if tree != self.in_tree:
            raise ConversionError(f"The step was converted for arguments {self.in_tree}, and is called with {tree}.")
        return dict(zip(self.program.inputs, leaves, strict=True))

    def operands(self, piece: Slice, values: dict[int, Any]) -> list[Any]:
        """What `piece` is called with."""
        return [o.value if isinstance(o, Constant) else values[o] for o in piece.inputs]

    def result(self, values: dict[int, Any]) -> Any:
        """What the step returns."""
        leaves = [o.value if isinstance(o, Constant) else values[o] for o in self.program.outputs]
        return jax.tree.unflatten(self.out_tree, leaves)

    def crossings(self) -> list[Crossing]:
        """What crosses, in order; a value that both sides can make, or that crossed before, is not sent."""
        homes = self._homes()
        known: dict[Side, set[int]] = {Side.DENSE: set(), Side.ATTENTION: set()}
        found = []
        needs = [(piece.level, piece.side, [v for v in piece.inputs if isinstance(v, int)]) for piece in self.slices]
        returned = [v for v in self.program.outputs if isinstance(v, int) and v not in self.program.kv_outputs]
        for level, side, needed in [*needs, (len(self.slices), Side.DENSE, returned)]:
            new = tuple(
                v for v in dict.fromkeys(needed) if v in homes and homes[v] is not side and v not in known[side]
            )
            known[side].update(new)
            if new:
                avals = [self.program.avals[value] for value in new]
                shapes, size = tuple(map(shape_text, avals)), sum(map(nbytes, avals))
                found.append(Crossing(level=level, to=side, values=new, shapes=shapes, nbytes=size))
        return found

    def context(self, level: int) -> tuple[int, ...]:
        """Values known on the dense side up to slice `level` and used there after it: what stays while attention runs
        (the paper's context). Weights and what is made from free arguments alone are not among them.
        """
        free, side = self.program.free, Side.DENSE
        before = {*self.program.input_of(Role.ACTIVATION)}
        before |= {v for piece in self.slices if piece.level <= level and piece.side is side for v in piece.outputs}
        after = {v for piece in self.slices if piece.level > level and piece.side is side for v in piece.inputs}
        return tuple(sorted(v for v in before & after if isinstance(v, int) and v not in free))

    def _homes(self) -> dict[int, Side]:
        """Where each value is made or given; free values are on both sides and have none."""
        free = self.program.free
        homes = {
            value: Side.ATTENTION if role is Role.KV else Side.DENSE
            for value, role in zip(self.program.inputs, self.program.roles, strict=True)
            if role is not Role.FREE
        }
        for piece in self.slices:
            homes |= dict.fromkeys((value for value in piece.outputs if value not in free), piece.side)
        return homes
