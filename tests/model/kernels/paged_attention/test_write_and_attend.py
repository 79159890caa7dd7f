"""A step that writes its KV and attends it, against dense attention over pools that hold it already."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from model.kernels.paged_attention import cpu_library, pool_shape, write_and_attend, write_kv
from model.kernels.paged_attention.pallas_tpu import stream
from tests.model.kernels.paged_attention import cases

MIXED = [40, 17, 0, 96, 5, 64, 16], [20, 1, 0, 1, 5, 33, 1]
DECODE = [1, 0, 15, 16, 17, 96, 33], [1, 0, 1, 1, 1, 1, 1]


def new_tokens(batch: cases.Batch) -> tuple[np.ndarray, list[jax.Array]]:
    """Slots of all tokens, -1 for padding, and their keys and values as the batch's pools hold them."""
    table, lengths, starts = (np.asarray(x) for x in batch[2:])
    size = batch.cache.k.shape[2]
    slots = np.full(batch.q.shape[0], -1, np.int32)
    for row, length in enumerate(lengths):
        for token in range(starts[row], starts[row + 1]):
            position = length - starts[row + 1] + token
            slots[token] = table[row, position // size] * size + position % size
    kv = [jnp.asarray(np.asarray(pool)[slots // size, :, slots % size]) for pool in batch.cache]
    return slots, kv


def emptied(pool: jax.Array, slots: np.ndarray) -> jax.Array:
    size = pool.shape[2]
    written = slots[slots >= 0]
    return pool.at[written // size, :, written % size].set(jnp.nan)


def check(batch: cases.Batch, max_query_len: int, **options) -> None:
    """Pools are in the shape that no backend copies: for heads of 64 two tokens share a row."""
    slots, (k, v) = new_tokens(batch)
    before = cases.Cache(*(emptied(pool, slots).reshape(pool_shape(*pool.shape)) for pool in batch.cache))
    step = jax.jit(functools.partial(write_and_attend, max_query_len=max_query_len, **options))
    out, *pools = step(batch.q, k, v, jnp.asarray(slots), before, *batch[2:])
    options.pop("implementation")
    expected, _ = cases.dense_attention(batch, **options)
    owned = int(batch.query_starts[-1])
    limit = cases.tolerance(str(batch.q.dtype))
    np.testing.assert_allclose(np.asarray(out.astype(jnp.float32))[:owned], expected[:owned], rtol=limit, atol=limit)
    for pool, whole in zip(pools, batch.cache, strict=True):
        assert pool.shape == pool_shape(*whole.shape)
        pool, whole = (np.asarray(x.astype(jnp.float32)).reshape(whole.shape) for x in (pool, whole))
        held = ~np.isnan(whole)
        np.testing.assert_array_equal(pool[held], whole[held])


@pytest.mark.parametrize("implementation", ["xla", "cpu_ffi", "pallas_tpu"])
@pytest.mark.parametrize(
    ("lengths", "queries", "dtype"),
    [(*DECODE, "float32"), (*MIXED, "bfloat16")],
    ids=["decode", "mixed"],
)
def test_writes_then_attends(implementation: str, lengths: list[int], queries: list[int], dtype: str) -> None:
    if implementation == "cpu_ffi" and (reason := cpu_library.unavailable()):
        pytest.skip(reason)
    batch = cases.build(cases.Shape(dtype=dtype, head_dim=128), lengths, queries)
    check(batch, max(queries), implementation=implementation)


@pytest.mark.parametrize("implementation", ["xla", "cpu_ffi", "pallas_tpu"])
def test_two_tokens_a_row(implementation: str) -> None:
    """Heads of 64; rows end in the first and in the second half of a row of 128."""
    if implementation == "cpu_ffi" and (reason := cpu_library.unavailable()):
        pytest.skip(reason)
    batch = cases.build(cases.Shape(page_size=32, max_pages=3), [40, 17, 0, 96, 5], [20, 1, 0, 1, 5])
    check(batch, 20, implementation=implementation, sliding_window=35)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("implementation", [None, "xla"])
def test_no_layer_copies_the_pools(implementation: str | None, head_dim: int, dtype: str) -> None:
    """Donated pools that several layers write and attend in turn, each layer its own pages of them."""
    by_xla = implementation == "xla" or cpu_library.unavailable()
    if by_xla and dtype == "bfloat16" and jax.__version_info__ < (0, 11):
        pytest.skip("XLA:CPU of jax 0.10 widens a bfloat16 pool to read or write it; the CPU library does not")
    pages, rows, layers = 1024, 4, 3
    described = jax.ShapeDtypeStruct(pool_shape(layers * pages, 2, 64, head_dim), dtype)
    vectors = jax.ShapeDtypeStruct((rows, 4, head_dim), dtype)
    integers = (jax.ShapeDtypeStruct(shape, "int32") for shape in ((rows,), (rows, 8), (rows,), (rows + 1,)))

    def step(q, pools, slots, table, lengths, starts):
        for layer in range(layers):
            here = slots + layer * pages * 64, pools, table + layer * pages, lengths, starts
            q, *written = write_and_attend(q, q[:, :2], q[:, 2:], *here, max_query_len=1, implementation=implementation)
            pools = cases.Cache(*written)
        return q, pools

    compiled = jax.jit(step, donate_argnums=1).lower(vectors, cases.Cache(described, described), *integers).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < described.size * described.dtype.itemsize / 16


@pytest.mark.parametrize(
    ("lengths", "queries"),
    [pytest.param(*DECODE, id="decode"), pytest.param(*MIXED, id="mixed", marks=pytest.mark.slow)],
)
def test_copies_to_and_from_the_pools_do_not_race(monkeypatch, lengths: list[int], queries: list[int]) -> None:
    """With a window, so that spans begin anywhere; and nothing is copied before somebody waits for it."""
    careful = pltpu.InterpretParams(detect_races=True, dma_execution_mode="on_wait")
    monkeypatch.setattr(stream, "interpret", lambda: careful)
    batch = cases.build(cases.Shape(head_dim=128, q_heads=2, kv_heads=1), lengths, queries)
    check(batch, max(queries), implementation="pallas_tpu", sliding_window=20, soft_cap=3.0)
    assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found


def test_new_tokens_of_another_size_are_refused() -> None:
    """Heads of 128 would fit rows that two heads of 64 share; they must not be taken for one token."""
    batch = cases.build(cases.Shape(page_size=32, max_pages=3), *DECODE)
    slots, (k, v) = new_tokens(batch)
    kept = cases.Cache(*(pool.reshape(pool_shape(*pool.shape)) for pool in batch.cache))
    wide = jnp.concatenate([k, k], axis=-1)
    for name, pair in (("k", (wide, wide)), ("v", (k, wide)), ("k", (k[..., 0], v))):
        with pytest.raises(ValueError, match=rf"`{name}` is .*; for these slots and pools it must be .*, 64\]"):
            write_and_attend(batch.q, *pair, jnp.asarray(slots), kept, *batch[2:], max_query_len=1)
    with pytest.raises(ValueError, match=r"`v` is .*, 128\]; for these slots and pools it must be .*, 64\]"):
        write_kv(*kept, k, wide, jnp.asarray(slots))
    with pytest.raises(ValueError, match=r"`k` is .*, 32\]; for these slots and pools it must be .*, 128\]"):
        write_kv(*kept, k[..., :32], v, jnp.asarray(slots))


def test_pools_with_scales_are_refused() -> None:
    batch = cases.build(cases.Shape(), *DECODE)
    slots, (k, v) = new_tokens(batch)
    cache = cases.quantize(batch.cache, "int8")
    with pytest.raises(ValueError, match="`cache` holds int8"):
        write_and_attend(batch.q, k, v, jnp.asarray(slots), cache, *batch[2:], max_query_len=1)
