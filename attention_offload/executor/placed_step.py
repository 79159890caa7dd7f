"""A cut step on two devices: dense slices on one, attention slices on the other, and arrays cross in between."""

import functools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from attention_offload.converter import Role, Side, SplitStep
from attention_offload.converter.program import Constant
from attention_offload.converter.slices import Slice


class PlacedStep:
    """Calls the slices of one step in order, without waiting for any.

    Each executable is a jit for one device, which moves what comes from the other device as it is called: that costs
    tens of microseconds a layer, `jax.device_put` hundreds. Free arguments go to both devices once, before the first
    slice. The pools are donated from slice to slice, so none is copied.

    Args:
        step: the cut step.
        dense, attention: the two devices; the same one twice is allowed.

    Attributes:
        crossed_bytes: bytes of activations that went from one side to the other so far.
    """

    def __init__(self, step: SplitStep, dense: jax.Device, attention: jax.Device) -> None:
        self.crossed_bytes = 0
        self._step = step
        self._shardings = {Side.DENSE: SingleDeviceSharding(dense), Side.ATTENTION: SingleDeviceSharding(attention)}
        self._jitted = _jitted(step, dense, attention)
        self._given = _given(step)
        self._bytes_a_step = sum(crossing.nbytes for crossing in step.crossings())

    def __call__(self, *args: Any) -> Any:
        """Dispatches the step. KV arguments are donated; they and the weights must be on their devices already."""
        bound = self._step.bind(args)
        # What each side is called with: the two differ in the free arguments, of which each has its own copy.
        values = {side: bound | self._put(side, bound) for side in Side}
        for piece in self._step.slices:
            results = self._jitted[piece.executable](*self._step.operands(piece, values[piece.side]))
            for known in values.values():
                known.update(zip(piece.outputs, results, strict=True))
        self.crossed_bytes += self._bytes_a_step
        return self._step.result(values[Side.DENSE])

    def compile(self) -> None:
        """Compiles every executable."""
        avals = self._step.program.avals
        users = _pieces_of_executables(self._step)
        for index, jitted in enumerate(self._jitted):
            operands = [o.aval if isinstance(o, Constant) else avals[o] for o in users[index][0].inputs]
            jitted.lower(*(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in operands)).compile()

    def _put(self, side: Side, values: dict[int, Any]) -> dict[int, Any]:
        """What the caller gives on the host, on the device of a side: one transfer for all of it."""
        wanted = [value for value in self._given[side] if isinstance(values[value], np.ndarray)]
        arrays = jax.device_put([values[value] for value in wanted], self._shardings[side])
        return dict(zip(wanted, arrays, strict=True))


@functools.lru_cache(maxsize=256)
def _jitted(step: SplitStep, dense: jax.Device, attention: jax.Device) -> tuple[jax.stages.Wrapped, ...]:
    """The step's executables, each for its device: what one `PlacedStep` has compiled, others of the step have too."""
    devices: Mapping[Side, jax.Device] = {Side.DENSE: dense, Side.ATTENTION: attention}
    users = _pieces_of_executables(step)
    return tuple(
        jax.jit(
            executable,
            in_shardings=SingleDeviceSharding(devices[users[index][0].side]),
            donate_argnums=_donated(step, users[index]),
        )
        for index, executable in enumerate(step.executables)
    )


def _pieces_of_executables(step: SplitStep) -> dict[int, list[Slice]]:
    pieces: dict[int, list[Slice]] = defaultdict(list)
    for piece in step.slices:
        pieces[piece.executable].append(piece)
    return pieces


def _given(step: SplitStep) -> dict[Side, list[int]]:
    """Free arguments and activations that each side is called with."""
    program = step.program
    given = {*program.input_of(Role.FREE), *program.input_of(Role.ACTIVATION)}
    used: dict[Side, dict[int, None]] = {side: {} for side in Side}
    for piece in step.slices:
        used[piece.side] |= {value: None for value in piece.inputs if isinstance(value, int) and value in given}
    return {side: [*values] for side, values in used.items()}


def _donated(step: SplitStep, pieces: Sequence[Slice]) -> tuple[int, ...]:
    """Parameters that are a pool in all of these slices, are used by no later one, and come out again."""
    alike, kept = step.program.alike, step.program.kv_outputs
    pools = {*step.program.input_of(Role.KV)}
    last_use: dict[int, int] = {}
    for piece in step.slices:
        values = [operand for operand in piece.inputs if isinstance(operand, int)]
        last_use |= dict.fromkeys(values, piece.level)
        pools |= {v for v in piece.outputs if any(alike(v, pool) for pool in pools.intersection(values))}

    def replaced(piece: Slice, place: int) -> bool:
        value = piece.inputs[place]
        return (
            isinstance(value, int)
            and value in pools - kept
            and last_use[value] == piece.level
            and any(alike(value, output) for output in pools.intersection(piece.outputs))
        )

    places = range(len(pieces[0].inputs))
    return tuple(place for place in places if all(replaced(piece, place) for piece in pieces))
