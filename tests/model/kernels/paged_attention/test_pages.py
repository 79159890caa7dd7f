"""Whole pages out of pools and into them: the same bits, and nothing where padding points."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.kernels.paged_attention import pool_shape, read_pages, write_pages


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (64, 64), (128, 16)])
def test_pages_are_read_and_written_and_padding_is_dropped(
    rng: np.random.Generator, head_dim: int, page_size: int, dtype: str
) -> None:
    shape = pool_shape(9, 2, page_size, head_dim)
    pools = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2)]
    new = [jnp.asarray(rng.normal(size=(4, *shape[1:])), dtype) for _ in range(2)]
    where = jnp.array([8, -1, 0, 3], jnp.int32)
    expected = [np.array(pool) for pool in pools]
    for pool, x in zip(expected, new, strict=True):
        pool[[8, 0, 3]] = np.array(x)[[0, 2, 3]]
    written = jax.jit(write_pages)(*pools, *new, where)
    for pool, right in zip(written, expected, strict=True):
        np.testing.assert_array_equal(np.array(pool), right)
    read = jax.jit(read_pages)(*pools, jnp.array([3, 3, 8], jnp.int32))
    for pool, x in zip(pools, read, strict=True):
        np.testing.assert_array_equal(np.array(x), np.array(pool)[[3, 3, 8]])
