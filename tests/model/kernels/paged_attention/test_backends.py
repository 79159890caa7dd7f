"""One suite for every backend of paged attention, against float64 numpy."""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels.paged_attention import paged_attention, scales_shape
from tests.model.kernels.paged_attention import cases


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend and what it can do; what it cannot, it must refuse."""

    name: str
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    head_dims: tuple[int, ...] = (64, 128, 256)
    prefill: bool = True
    quantized: tuple[str, ...] = ("int8", "float8_e4m3fn")
    quantized_page: int = 16
    interpreted: bool = False


BACKENDS = [
    Backend("reference"),
    Backend("xla"),
    Backend("cpu_ffi"),
    Backend("pallas_tpu", dtypes=("float32", "bfloat16")),
    Backend("mosaic_gpu", ("bfloat16", "float16"), quantized_page=32, interpreted=True),
]
every_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
# Interpreters take a minute for what a kernel does in microseconds.
every_backend_at_length = pytest.mark.parametrize(
    "backend",
    [pytest.param(b, marks=pytest.mark.slow) if b.interpreted else b for b in BACKENDS],
    ids=lambda backend: backend.name,
)


@functools.partial(
    jax.jit, static_argnames=("max_query_len", "scale", "sliding_window", "soft_cap", "implementation", "return_lse")
)
def attend(batch, **options):
    return paged_attention(*batch, **options)


def check(backend: Backend, batch: cases.Batch, max_query_len: int, expected=None, **options) -> None:
    dtype = str(batch.q.dtype)
    run = functools.partial(
        attend, batch, max_query_len=max_query_len, implementation=backend.name, return_lse=True, **options
    )
    out, lse = run()
    again, lse_again = run()
    expected, expected_lse = expected or cases.dense_attention(batch, **options)
    owned = int(batch.query_starts[-1])
    assert out.dtype == batch.q.dtype
    assert lse.dtype == jnp.float32
    assert np.all(np.isfinite(np.asarray(out.astype(jnp.float32)))), "padding and empty rows must be finite"
    limit = cases.tolerance(dtype)
    np.testing.assert_allclose(np.asarray(out.astype(jnp.float32))[:owned], expected[:owned], rtol=limit, atol=limit)
    np.testing.assert_allclose(np.asarray(lse)[:owned], expected_lse[:owned], rtol=1e-5, atol=max(1e-5, limit / 4))
    np.testing.assert_array_equal(np.asarray(out), np.asarray(again))
    np.testing.assert_array_equal(np.asarray(lse), np.asarray(lse_again))


DECODE_LENGTHS = [1, 0, 15, 16, 17, 96, 33]
MIXED_LENGTHS, MIXED_QUERIES = [40, 17, 0, 96, 5, 64], [20, 1, 0, 1, 5, 33]


@every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_decode(backend: Backend, dtype: str) -> None:
    batch = cases.build(cases.Shape(dtype=dtype), DECODE_LENGTHS, [1] * 7)
    if dtype not in backend.dtypes:
        with pytest.raises(NotImplementedError, match=dtype):
            check(backend, batch, 1)
        return
    check(backend, batch, 1)


@every_backend_at_length
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_chunks_and_decode_rows_in_one_batch(backend: Backend, dtype: str) -> None:
    batch = cases.build(cases.Shape(dtype=dtype), MIXED_LENGTHS, MIXED_QUERIES)
    if not backend.prefill or dtype not in backend.dtypes:
        with pytest.raises(NotImplementedError, match="max_query_len|" + dtype):
            check(backend, batch, 33)
        return
    check(backend, batch, 33)


def check_integers(backend: Backend, dtype: str, lengths: list[int], queries: list[int]) -> None:
    batch = cases.build_integers(cases.Shape(dtype=dtype), lengths, queries)
    out, lse = attend(batch, max_query_len=max(queries), implementation=backend.name, return_lse=True)
    expected, expected_lse = cases.dense_attention(batch)
    owned, limit = sum(queries), cases.integer_tolerance(dtype)
    out = np.asarray(out.astype(jnp.float32))
    np.testing.assert_allclose(out[:owned], expected[:owned], rtol=limit, atol=1e-6)
    np.testing.assert_allclose(np.asarray(lse)[:owned], expected_lse[:owned], rtol=1e-5, atol=1e-5)


@every_backend
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_decode_of_integers_misses_no_key(backend: Backend, dtype: str) -> None:
    if dtype in backend.dtypes:
        check_integers(backend, dtype, DECODE_LENGTHS, [1] * 7)


@every_backend_at_length
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunks_of_integers_miss_no_key(backend: Backend, dtype: str) -> None:
    if dtype in backend.dtypes:
        check_integers(backend, dtype, MIXED_LENGTHS, MIXED_QUERIES)


def test_integers_show_a_dropped_key() -> None:
    """In every token that sees the key, and by far more than the tolerances, in out and in lse."""
    batch = cases.build_integers(cases.Shape(dtype="bfloat16"), MIXED_LENGTHS, MIXED_QUERIES)
    whole, lse = cases.dense_attention(batch)
    last_seen = np.concatenate([np.arange(n - q, n) for n, q in zip(MIXED_LENGTHS, MIXED_QUERIES, strict=True)])
    for dropped in range(max(MIXED_LENGTHS)):
        part, part_lse = cases.dense_attention(batch, dropped=dropped)
        sees = np.flatnonzero(last_seen >= dropped)
        change = np.abs(whole - part)[sees] / np.maximum(whole, part)[sees].clip(1e-30)
        assert change.max(axis=-1).min() > 0.1
        assert (lse[sees] - part_lse[sees]).min() > 2e-4


@every_backend_at_length
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "head_dim", "page_size"), [(3, 3, 64, 16), (8, 1, 128, 32), (8, 2, 256, 16)]
)
def test_head_layouts(backend: Backend, q_heads: int, kv_heads: int, head_dim: int, page_size: int) -> None:
    shape = cases.Shape(q_heads, kv_heads, head_dim, page_size, dtype=backend.dtypes[0])
    if head_dim not in backend.head_dims:
        with pytest.raises(NotImplementedError, match=f"head_dim is {head_dim}"):
            check(backend, cases.build(shape, [29, 70], [29, 1]), 29)
    elif backend.prefill:
        check(backend, cases.build(shape, [29, 70], [29, 1]), 29)
    else:
        check(backend, cases.build(shape, [29, 70], [1, 1]), 1)


@every_backend_at_length
@pytest.mark.parametrize("options", [{"sliding_window": 16}, {"soft_cap": 2.0, "scale": 0.25}], ids=str)
def test_options(backend: Backend, options: dict[str, float]) -> None:
    shape = cases.Shape(dtype=backend.dtypes[0])
    check(backend, cases.build(shape, DECODE_LENGTHS, [1] * 7), 1, **options)
    if backend.prefill:
        check(backend, cases.build(shape, MIXED_LENGTHS, MIXED_QUERIES), 33, **options)


@every_backend_at_length
@pytest.mark.parametrize("kv_dtype", ["int8", "float8_e4m3fn"])
def test_quantized_kv(backend: Backend, kv_dtype: str) -> None:
    """The same as attention over the values that the quantized pool stands for."""
    queries = MIXED_QUERIES if backend.prefill else [1] * 6
    shape = cases.Shape(page_size=backend.quantized_page, dtype=backend.dtypes[0])
    batch = cases.build(shape, MIXED_LENGTHS, queries)
    quantized = batch._replace(cache=cases.quantize(batch.cache, kv_dtype))
    expected = cases.dense_attention(batch._replace(cache=cases.dequantize(quantized.cache)))
    if kv_dtype not in backend.quantized:
        with pytest.raises(NotImplementedError, match=kv_dtype):
            check(backend, quantized, max(queries), expected)
        return
    check(backend, quantized, max(queries), expected)


@pytest.mark.parametrize("name", ["xla", "pallas_tpu"])
def test_scales_in_whole_tiles_are_the_same_scales(name: str) -> None:
    """Pages of 64: two heads share a row of 128 scales."""
    batch = cases.build(cases.Shape(4, 4, page_size=64, max_pages=3), [150, 1], [20, 1])
    quantized = cases.quantize(batch.cache, "int8")
    expected = cases.dense_attention(batch._replace(cache=cases.dequantize(quantized)))
    shape = scales_shape(*quantized.k.shape[:3])
    assert shape[1:] == (2, 128)
    k_scale, v_scale = (scale.reshape(shape) for scale in quantized[2:])
    check(Backend(name), batch._replace(cache=quantized._replace(k_scale=k_scale, v_scale=v_scale)), 20, expected)


@every_backend_at_length
@hypothesis.settings(max_examples=15, derandomize=True)
@hypothesis.given(data=st.data())
def test_any_lengths(backend: Backend, data: st.DataObject) -> None:
    """Random lengths and splits of 24 query tokens over 5 rows, at fixed shapes, with a window that cuts pages."""
    shape = cases.Shape(dtype=backend.dtypes[0], max_pages=5, padding=0)
    if backend.prefill:
        cuts = sorted(data.draw(st.lists(st.integers(0, 24), min_size=4, max_size=4)))
        queries = np.diff([0, *cuts, 24]).tolist()
    else:
        queries = [1] * 5
    lengths = [data.draw(st.integers(n, 80)) for n in queries]
    batch = cases.build(shape, lengths, queries, seed=data.draw(st.integers(0, 9)))
    pages = 5 * shape.max_pages + 3 - batch.cache.k.shape[0]
    grown = [jnp.pad(pool, ((0, pages), (0, 0), (0, 0), (0, 0)), constant_values=np.nan) for pool in batch.cache]
    check(backend, batch._replace(cache=cases.Cache(*grown)), max(24 if backend.prefill else 1, 1), sliding_window=20)
