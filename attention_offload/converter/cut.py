"""Which side runs each equation: one minimum s-t cut over the whole step, by the bytes that cross.

Every equation stands on the dense side (s) or on the attention side (t). Weights and what enters or leaves the step are
pinned to the dense side, KV to the attention side. A value costs its bytes once if any user is on the other side; what
is made from free arguments alone costs nothing and exists on both. No equation runs twice, so no bit changes. (Lamina,
section 4.2, asks for one cut per attention operator around a marked operator; this one needs no marks.)
"""

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from attention_offload.converter.errors import ConversionError
from attention_offload.converter.program import Equation, Program
from attention_offload.converter.roles import Role, Side

_DENSE, _ATTENTION = 0, 1
_LARGEST = np.iinfo(np.int32).max


def place(program: Program) -> list[Side]:
    """The side of each equation, with the fewest bytes crossing; of equal cuts the one with the least attention side.

    Equations over free values alone count as dense.

    Raises:
        ConversionError: an equation needs weights and KV, so that one of them would have to cross.
    """
    graph = _Graph(program)
    attention = graph.minimum()
    if attention is None:
        raise ConversionError(_mixed(program))
    return [Side.ATTENTION if index in attention else Side.DENSE for index in range(len(program.equations))]


class _Graph:
    """Flow network: two ends, a node per equation, and two per value, so that a value that many use costs once."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._free = program.free
        self._edges: list[tuple[int, int, int]] = []
        self._size = 2 + len(program.equations)
        self._unbounded = -1
        self._users = self._users_of()
        self._add_values()

    def _users_of(self) -> dict[int, list[int]]:
        users: dict[int, list[int]] = defaultdict(list)
        for index, equation in enumerate(self._program.equations):
            for value in equation.values:
                users[value].append(2 + index)
        kept = self._program.kv_outputs
        for output in dict.fromkeys(self._program.outputs):
            if isinstance(output, int):
                users[output].append(_ATTENTION if output in kept else _DENSE)
        return users

    def _add_values(self) -> None:
        program = self._program
        for value, role in zip(program.inputs, program.roles, strict=True):
            if role is Role.KV:
                self._add(value, _ATTENTION, self._unbounded)
            elif role is Role.WEIGHT:
                self._add(value, _DENSE, self._unbounded)
            elif role is Role.ACTIVATION:
                self._add(value, _DENSE, program.nbytes(value))
        for index, equation in enumerate(program.equations):
            for value in equation.outputs:
                self._add(value, 2 + index, program.nbytes(value))

    def _add(self, value: int, producer: int, cost: int) -> None:
        """The price of a value: paid once if a user is not where its producer is, in either direction."""
        if value in self._free or not (users := self._users.get(value)):
            return
        sent, asked = self._size, self._size + 1
        self._size += 2
        self._edges += [(producer, sent, cost), (asked, producer, cost)]
        for user in users:
            self._edges += [(sent, user, self._unbounded), (user, asked, self._unbounded)]

    def minimum(self) -> set[int] | None:
        """Equations on the attention side; `None` where every cut goes through weights or KV."""
        costs = [cost for _, _, cost in self._edges if cost > 0]
        unit = math.gcd(*costs) if costs else 1
        # A cut costs at most what all activations weigh; beyond that an edge is not to be cut.
        bound = sum(costs) // unit + 1
        if bound > _LARGEST:
            unit, bound = unit * -(-bound // (_LARGEST // 2)), _LARGEST
        capacities = [bound if cost < 0 else max(1, cost // unit) if cost else 0 for _, _, cost in self._edges]
        begins, ends, _ = (np.array(column) for column in zip(*self._edges, strict=True))
        network = coo_array((np.array(capacities, np.int32), (begins, ends)), shape=(self._size, self._size)).tocsr()
        network.data = np.minimum(network.data, bound).astype(np.int32)
        result = maximum_flow(csr_array(network), _DENSE, _ATTENTION)
        if result.flow_value >= bound:
            return None
        residual = (network - result.flow).tocsr()
        residual.data = (residual.data > 0).astype(np.int8)
        residual.eliminate_zeros()
        # What can still send to the attention end is on its side: the least such set.
        reaching = breadth_first_order(residual.T.tocsr(), _ATTENTION, return_predecessors=False)
        return {int(node) - 2 for node in reaching if 2 <= node < 2 + len(self._program.equations)}


def _mixed(program: Program) -> str:
    """Which equation is at fault, for the message: the first that takes both in one go."""
    weight, kv = set(program.input_of(Role.WEIGHT)), set(program.input_of(Role.KV))
    for equation in program.equations:
        if weight.intersection(equation.values) and kv.intersection(equation.values):
            return f"`{equation.name}` takes a weight and KV together; separate what it does with each."
    return "Weights and KV meet without an activation between them, so neither can stay on its side; check the roles."


def levels(program: Program, sides: Sequence[Side]) -> list[int]:
    """How often data has crossed before each equation: even levels are dense slices, odd ones attention.

    What depends on an activation runs as early as it can. What is made from weights or KV alone runs in the slice that
    uses it, or every slice would begin with the preparations of all that follow.
    """
    free = program.free
    producer = {value: index for index, equation in enumerate(program.equations) for value in equation.outputs}
    level = [int(side is Side.ATTENTION) for side in sides]
    idle = _without_activation(program)
    for index, equation in enumerate(program.equations):
        for value in equation.values:
            if value in producer and value not in free and value not in idle:
                before = producer[value]
                level[index] = max(level[index], level[before] + (sides[before] is not sides[index]))
    _defer(program, sides, level, idle - free, producer)
    return level


def _without_activation(program: Program) -> set[int]:
    """Values that depend on no activation."""
    idle = {value for value, role in zip(program.inputs, program.roles, strict=True) if role is not Role.ACTIVATION}
    for equation in program.equations:
        if idle.issuperset(equation.values):
            idle.update(equation.outputs)
    return idle


def _defer(program: Program, sides: Sequence[Side], level: list[int], idle: set[int], producer: dict[int, int]) -> None:
    """Moves equations over `idle` values to the earliest slice that uses them."""
    first_use: dict[int, int] = {}
    for index in reversed(range(len(program.equations))):
        equation: Equation = program.equations[index]
        if idle.issuperset(equation.outputs):
            used = [first_use[value] for value in equation.outputs if value in first_use]
            if used:
                level[index] = min(used)
        for value in equation.values:
            if value in producer and value in idle:
                at = level[index] - (sides[producer[value]] is not sides[index])
                first_use[value] = min(first_use.get(value, at), at)
