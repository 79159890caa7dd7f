"""Cut steps: the slices together are the step, and what crosses is what must."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_offload.converter import ConversionError, Role, Side, SplitStep, convert
from attention_offload.converter.cut import place
from attention_offload.converter.normalise import normalise
from attention_offload.converter.program import Program
from tests.attention_offload.converter import steps
from tests.attention_offload.converter.steps import Step

# Foreign blocks are fused otherwise in slices than as a whole: LLVM then contracts other products with sums, and XLA
# keeps other bfloat16 values in float32. Without either, equal arithmetic gives equal bits.
_PLAIN: dict[str, Any] = {"xla_backend_optimization_level": 0, "xla_allow_excess_precision": False}
DTYPES = [jnp.float32, jnp.bfloat16]


def _split(step: Step) -> SplitStep:
    return convert(step.function, step.roles, *step.args)


def _run(cut: SplitStep, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """All slices in order, with options for the compiler."""
    return cut.run([jax.jit(executable, compiler_options=options) for executable in cut.executables], args)


def _assert_bitwise(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", steps.FAMILIES)
def test_slices_of_the_engines_step_are_the_step(family: str, dtype: Any) -> None:
    step = steps.engine_step(family, layers=2, dtype=dtype)
    _assert_bitwise(_split(step)(*step.args), jax.jit(step.function)(*step.args))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", steps.FOREIGN)
def test_slices_of_a_foreign_step_are_the_step(name: str, dtype: Any) -> None:
    step = steps.FOREIGN[name](dtype=dtype)
    want = jax.jit(step.function, compiler_options=_PLAIN)(*step.args)
    _assert_bitwise(_run(_split(step), step.args, _PLAIN), want)


@pytest.mark.parametrize("name", [*steps.FOREIGN, *steps.FAMILIES])
def test_queries_keys_values_and_results_cross_and_nothing_else(name: str) -> None:
    step = steps.FOREIGN[name]() if name in steps.FOREIGN else steps.engine_step(name)
    cut = _split(step)
    assert [piece.side for piece in cut.slices] == [Side.DENSE, Side.ATTENTION] * step.layers + [Side.DENSE]
    crossings = cut.crossings()
    assert [len(crossing.values) for crossing in crossings] == [3, 1] * step.layers
    for layer in range(step.layers):
        there, back = crossings[2 * layer : 2 * layer + 2]
        assert (there.to, back.to) == (Side.ATTENTION, Side.DENSE)
        assert there.nbytes + back.nbytes == step.crossing_bytes


@pytest.mark.parametrize("name", ["einsum", "post_norm", "linen"])
def test_only_the_residual_stays_while_attention_runs(name: str) -> None:
    step = steps.FOREIGN[name]()
    cut = _split(step)
    for layer in range(step.layers):
        (context,) = cut.context(2 * layer)
        assert cut.program.avals[context].shape[-1] == steps.WIDTH


def test_the_attention_side_is_the_attention_alone() -> None:
    cut = _split(steps.written_by_hand(layers=1))
    (attention,) = (piece for piece in cut.slices if piece.side is Side.ATTENTION)
    names = [equation.primitive.name for equation in cut.executables[attention.executable].equations]
    assert names.count("scatter") == names.count("dot_general") == 2
    assert "exp" in names
    assert not {"sin", "cos", "rsqrt"}.intersection(names)


@pytest.mark.parametrize("layers", [3, 5, 9])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_three_dense_executables_and_one_of_attention_at_any_depth(family: str, layers: int) -> None:
    cut = _split(steps.engine_step(family, layers=layers))
    for side, expected in ((Side.DENSE, 3), (Side.ATTENTION, 1)):
        assert len({piece.executable for piece in cut.slices if piece.side is side}) == expected


def test_angles_of_rope_are_taken_once() -> None:
    cut = _split(steps.engine_step("llama", layers=4))
    cosines = [
        sum(equation.primitive.name == "cos" for equation in cut.executables[piece.executable].equations)
        for piece in cut.slices
    ]
    assert cosines == [1] + [0] * 8


def _bytes_crossing(program: Program, sides: tuple[Side, ...]) -> int | None:
    """What a placement costs, counted by hand; `None` where weights or KV would cross."""
    free = program.free
    home = {
        value: Side.ATTENTION if role is Role.KV else Side.DENSE
        for value, role in zip(program.inputs, program.roles, strict=True)
    }
    kept = program.kv_outputs
    uses = [(output, Side.ATTENTION if output in kept else Side.DENSE) for output in program.outputs]
    for equation, side in zip(program.equations, sides, strict=True):
        home |= dict.fromkeys(equation.outputs, side)
        uses += [(value, side) for value in equation.values]
    crossing = {
        value for value, side in uses if isinstance(value, int) and value not in free and home[value] is not side
    }
    fixed = {*program.input_of(Role.WEIGHT), *program.input_of(Role.KV)}
    return None if crossing & fixed else sum(program.nbytes(value) for value in crossing)


def _random_program(seed: int) -> Program:
    """A small step of random shapes in which attention is only one of many things that could be cut off."""
    rng = np.random.default_rng(seed)
    width = [int(w) for w in rng.choice([1, 2, 3, 5, 8], 6)]

    def step(w: jax.Array, kv: jax.Array, x: jax.Array, free: jax.Array) -> Any:
        values = [x, x @ w]
        for draw in rng.integers(0, 5, 5):
            one = values[int(rng.integers(len(values)))]
            size = width[int(rng.integers(6))]
            if draw == 0:
                values.append(one[:, :size] * 2.0)
            elif draw == 1:
                values.append(jnp.concatenate([one, one], -1)[:, :8])
            elif draw == 2:
                values.append(kv[:, : one.shape[-1]] + one)
            elif draw == 3:
                values.append(one.sum(-1, keepdims=True) + free[:, None])
            else:
                values.append(jnp.exp(one))
        return values[-1], values[-2], kv.at[:, 0].set(values[-3][:, 0])

    shapes = ((8, 8), (2, 8), (2, 8), (2,))
    traced = jax.make_jaxpr(step)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes))
    return normalise(traced, (Role.WEIGHT, Role.KV, Role.ACTIVATION, Role.FREE))


@pytest.mark.parametrize("seed", range(40))
def test_no_other_placement_sends_less(seed: int) -> None:
    program = _random_program(seed)
    if len(program.equations) > 15:
        pytest.skip(f"{len(program.equations)} equations are too many to try all placements")
    costs = [_bytes_crossing(program, sides) for sides in itertools.product(Side, repeat=len(program.equations))]
    assert _bytes_crossing(program, tuple(place(program))) == min(cost for cost in costs if cost is not None)


def test_what_cannot_be_cut_is_named() -> None:
    x, w, kv = jnp.ones((2, 4)), jnp.ones((4, 4)), jnp.ones((2, 4))
    roles = (Role.WEIGHT, Role.KV, Role.ACTIVATION)
    with pytest.raises(ConversionError, match=r"`dot_general` takes a weight and KV together"):
        convert(lambda w, kv, x: kv @ w + x, roles, w, kv, x)
    with pytest.raises(ConversionError, match=r"`cond` takes weights and KV together"):
        convert(lambda w, kv, x: jax.lax.cond(x[0, 0] > 0, lambda: kv + x @ w, lambda: kv), roles, w, kv, x)
    with pytest.raises(ConversionError, match=r"closes over an array float32\[200,200\] of 160000 bytes"):
        convert(lambda kv, x: x + kv * jnp.sum(jnp.asarray(_BIG)), roles[1:], kv, x)
    with pytest.raises(ConversionError, match=r"No argument has Role\.KV"):
        convert(lambda w, x: x @ w, (Role.WEIGHT, Role.ACTIVATION), w, x)
    with pytest.raises(ConversionError, match="2 roles for 3 arguments"):
        convert(lambda w, kv, x: x, roles[:2], w, kv, x)
    with pytest.raises(ConversionError, match="no prefix"):
        convert(lambda w, kv, x: x, ([Role.WEIGHT, Role.WEIGHT], Role.KV, Role.ACTIVATION), w, kv, x)


_BIG = np.ones((200, 200), np.float32)


def test_arguments_of_another_structure_are_refused() -> None:
    step = steps.written_by_hand(layers=1)
    with pytest.raises(ConversionError, match="converted for arguments"):
        _split(step)(*step.args[:-1])


def test_eighty_layers_are_cut_without_running_anything() -> None:
    step = steps.written_by_hand(layers=80)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), step.args)
    cut = convert(step.function, step.roles, *shapes)
    assert sum(crossing.nbytes for crossing in cut.crossings()) == 80 * step.crossing_bytes
    assert len(cut.executables) == 4
