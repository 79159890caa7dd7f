"""What only the Hopper backend has: its launches, its refusals, and interpreted kernels without races."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from model.kernels.paged_attention import TileSizes, paged_attention
from model.kernels.paged_attention.mosaic_gpu import backend
from tests.model.kernels.paged_attention import cases


@pytest.mark.parametrize(("q_heads", "window"), [(2, None), (1, 70)])
def test_a_chunk_that_ends_inside_a_page(q_heads: int, window: int | None) -> None:
    """Two heads share a tile, or two tiles a head; the last page's unwritten half is poisoned.

    The chunk follows a decode row, so its first tile begins with a token of another.
    """
    shape = cases.Shape(q_heads, 1, 64, 64, max_pages=3, padding=1, dtype="bfloat16")
    batch = cases.build(shape, [3, 150], [1, 75])
    attend = jax.jit(
        lambda batch: paged_attention(
            *batch, max_query_len=75, sliding_window=window, implementation="mosaic_gpu", return_lse=True
        )
    )
    out, lse = attend(batch)
    expected, expected_lse = cases.dense_attention(batch, sliding_window=window)
    limit = cases.tolerance("bfloat16")
    np.testing.assert_allclose(np.asarray(out, np.float32)[:76], expected[:76], rtol=limit, atol=limit)
    np.testing.assert_allclose(np.asarray(lse)[:76], expected_lse[:76], rtol=1e-5, atol=1e-5)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize("head_dim", [64, 128])
def test_splits_are_put_together(head_dim: int) -> None:
    """A row that fills its splits, one that leaves some empty, an empty one, and a token that nobody owns."""
    batch = cases.build(
        cases.Shape(2, 1, head_dim, 64, max_pages=4, padding=1, dtype="bfloat16"), [200, 20, 0], [1] * 3
    )
    attend = functools.partial(paged_attention, max_query_len=1, implementation="mosaic_gpu", return_lse=True)
    out, lse = jax.jit(functools.partial(attend, tile_sizes=TileSizes(splits=3)))(*batch)
    expected, expected_lse = cases.dense_attention(batch)
    limit = cases.tolerance("bfloat16")
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=limit, atol=limit)
    np.testing.assert_allclose(np.asarray(lse), expected_lse, rtol=1e-5, atol=1e-5)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    ("head_dim", "kv_dtype"),
    [(256, None), (64, "int8"), pytest.param(128, "float8_e4m3fn", marks=pytest.mark.slow)],
)
def test_wide_heads_and_scaled_values(head_dim: int, kv_dtype: str | None) -> None:
    """A decode row and a chunk of two, whose last pages hold NaN, or scales of NaN, beyond them."""
    shape = cases.Shape(1, 1, head_dim, 32, max_pages=3, padding=0, dtype="bfloat16")
    batch = cases.build(shape, [70, 33], [1, 2])
    pools, cache = batch.cache, batch.cache
    if kv_dtype is not None:
        cache = cases.quantize(batch.cache, kv_dtype)
        pools = cases.dequantize(cache)
    expected, expected_lse = cases.dense_attention(batch._replace(cache=pools))
    attend = functools.partial(paged_attention, max_query_len=2, implementation="mosaic_gpu", return_lse=True)
    out, lse = jax.jit(attend)(*batch._replace(cache=cache))
    limit = cases.tolerance("bfloat16")
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=limit, atol=limit)
    np.testing.assert_allclose(np.asarray(lse), expected_lse, rtol=1e-3, atol=limit / 4)
    assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    ("rows", "max_pages", "splits"), [(32, 64, 1), (64, 64, 1), (1, 512, 30), (8, 64, 4), (1, 1, 1), (16, 3, 1)]
)
def test_small_batches_are_split_until_the_device_is_busy(rows: int, max_pages: int, splits: int) -> None:
    """264 thread blocks are resident on 132 multiprocessors; a split has four blocks of keys at least."""
    assert backend.decode_launch(cases.problem(rows=rows, max_pages=max_pages)).splits == splits


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_dtype": jnp.dtype("float32")}, "the pools are float32"),
        ({"kv_dtype": jnp.dtype("int8"), "head_dim": 256}, "head_dim is 256; with scales"),
        ({"kv_dtype": jnp.dtype("int8"), "page_size": 16}, "page_size is 16; with scales"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"head_dim": 96}, "head_dim is 96"),
        ({"page_size": 256}, "page_size is 256"),
        ({"q_heads": 1024}, "128 query heads share a KV head"),
    ],
)
def test_refusals_say_why(changes, reason: str) -> None:
    assert reason in (backend.unsupported(cases.problem(**changes)) or "")
