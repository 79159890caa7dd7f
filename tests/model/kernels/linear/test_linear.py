"""One suite over every backend of `linear`, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from model.kernels.linear import IMPLEMENTATIONS, grouped_linear, linear
from model.kernels.paged_attention import cpu_library
from model.sharding import parse_mesh, weight_sharding

# (columns, size): tails of the blocks of 8 and of 32 columns, one vector, several slices of 1024, uneven last slice.
SHAPES = [(8, 32), (77, 64), (5, 1536), (40, 2048), (21, 2080)]


def _operands(rows: int, columns: int, size: int, dtype) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(rows * size)
    x, weight = rng.standard_normal((rows, size)), rng.standard_normal((columns, size))
    return jnp.asarray(x, dtype), jnp.asarray(weight, dtype)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu_ffi" and (reason := cpu_library.unavailable()):
        pytest.skip(f"the CPU kernels are not available: {reason}")
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_float64(implementation: str, dtype: str, shape: tuple[int, int]):
    operands = [_operands(rows, *shape, dtype) for rows in (1, 2, 3, 4, 7, 8, 9, 21, 40)]
    outs = jax.jit(lambda operands: [linear(x, weight, implementation) for x, weight in operands])(operands)
    for (x, weight), out in zip(operands, outs, strict=True):
        expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        assert out.dtype == jnp.float32
        # Products are exact in bfloat16; both dtypes round the running sum of `size` terms to float32.
        np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6 * shape[1] ** 0.5 * 4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_each_block_has_its_own_choice_of_weight(implementation: str, dtype: str, rows: int):
    x, weights = (operand.reshape(6, -1, 64) for operand in _operands(6 * rows, 6 * 21, 64, dtype))
    which = jnp.array([2, 0, 2, 5, 5, 1], jnp.int32)
    out = grouped_linear(x, weights, which, implementation)
    # XLA promises no order of its sums, and may take another for a batch; ours is the same in both.
    atol = 0.0 if implementation == "cpu_ffi" else 2e-6 * 64**0.5 * 4
    for block, weight in enumerate(which):
        np.testing.assert_allclose(out[block], linear(x[block], weights[weight], implementation), rtol=0, atol=atol)


def test_gradients_of_grouped_weights(implementation: str):
    x, weights = (operand.reshape(4, -1, 32) for operand in _operands(12, 32, 32, "float32"))
    which = jnp.array([3, 1, 3, 0], jnp.int32)

    def loss(x, weights, multiply):
        return jnp.sum(jnp.sin(multiply(x, weights)))

    ours = functools.partial(grouped_linear, which=which, implementation=implementation)
    actual = jax.grad(loss, (0, 1))(x, weights, ours)
    expected = jax.grad(loss, (0, 1))(x, weights, lambda x, w: jnp.einsum("brk,bck->brc", x, w[which]))
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_of_the_cpu_kernel_does_not_depend_on_the_others(dtype: str):
    if reason := cpu_library.unavailable():
        pytest.skip(f"the CPU kernels are not available: {reason}")
    x, weight = _operands(32, 24, 2080, dtype)
    together = linear(x, weight, "cpu_ffi")
    for first, last in ((0, 1), (1, 3), (3, 6), (6, 14), (14, 31)):
        np.testing.assert_array_equal(linear(x[first:last], weight, "cpu_ffi"), together[first:last])


def test_two_runs_agree_to_the_bit(implementation: str):
    x, weight = _operands(5, 700, 512, "float32")
    np.testing.assert_array_equal(linear(x, weight, implementation), linear(x, weight, implementation))


def test_gradients_equal_those_of_a_plain_product(implementation: str):
    x, weight = _operands(3, 8, 32, "float32")

    def loss(x, weight, multiply):
        return jnp.sum(jnp.sin(multiply(x, weight)))

    actual = jax.grad(loss, (0, 1))(x, weight, functools.partial(linear, implementation=implementation))
    expected = jax.grad(loss, (0, 1))(x, weight, lambda x, weight: x @ weight.T)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)  # sines of sums of order 6 in float32


def test_vmap_and_jit(implementation: str):
    x, weight = _operands(6, 8, 32, "float32")
    out = jax.jit(jax.vmap(lambda x: linear(x, weight, implementation)))(x.reshape(3, 2, 32))
    np.testing.assert_allclose(out.reshape(6, 8), linear(x, weight), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size", "reason"), [("float32", 24, "multiple of 16"), ("float16", 32, "float16; it must be one of")]
)
def test_what_the_cpu_kernel_does_not_take_is_refused(dtype: str, size: int, reason: str):
    x, weight = _operands(2, 8, size, dtype)
    with pytest.raises(NotImplementedError, match=reason):
        linear(x, weight, "cpu_ffi")
    np.testing.assert_array_equal(linear(x, weight), linear(x, weight, "xla"))


def test_over_a_mesh_xla_multiplies_and_inside_shard_map_the_kernel_does(implementation: str):
    mesh = parse_mesh("tp:4")
    x, weight = _operands(2, 8, 32, "float32")
    split = jax.device_put(weight, weight_sharding(mesh, ("heads", "embed"), weight.shape))
    expected = linear(x, weight, "xla")
    np.testing.assert_allclose(jax.jit(linear)(x, split), expected, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"on a mesh \{'dp': 1, 'tp': 4\}"):
        jax.jit(functools.partial(linear, implementation="cpu_ffi"))(x, split)
    by_column = jax.shard_map(
        functools.partial(linear, implementation=implementation),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("tp")),
        out_specs=PartitionSpec(None, "tp"),
    )
    np.testing.assert_allclose(jax.jit(by_column)(x, split), expected, atol=1e-5)


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match=r"`implementation` is 'triton'; it must be one of \('cpu_ffi', 'xla'\)"):
        linear(jnp.ones((1, 32)), jnp.ones((8, 32)), "triton")
