"""What holds whatever the backend: refusals, writes in place, sharding, merging."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from model.kernels.paged_attention import IMPLEMENTATIONS, cpu_library, merge, paged_attention, pool_shape, write_kv
from tests.model.kernels.paged_attention import cases


def test_arguments_that_do_not_fit_are_refused_with_their_values() -> None:
    batch = cases.build(cases.Shape(), [5, 6], [1, 1])
    with pytest.raises(ValueError, match=r"`q` has 3 heads, which the 2 KV heads do not divide"):
        paged_attention(*batch._replace(q=batch.q[:, :3]), max_query_len=1)
    with pytest.raises(ValueError, match=r"`lengths` must be \[2\]"):
        paged_attention(*batch._replace(lengths=batch.lengths[:1]), max_query_len=1)
    with pytest.raises(ValueError, match="`sliding_window` is 0"):
        paged_attention(*batch, max_query_len=1, sliding_window=0)
    with pytest.raises(ValueError, match="'gpu'; it must be one of"):
        paged_attention(*batch, max_query_len=1, implementation="gpu")
    int8 = cases.Cache(*(jnp.zeros(batch.cache.k.shape, jnp.int8) for _ in range(2)))
    with pytest.raises(ValueError, match=r"`cache\.k_scale` is missing, but the pools are int8"):
        paged_attention(*batch._replace(cache=int8), max_query_len=1)


def test_what_a_backend_does_not_cover_raises_with_the_reason_of_every_backend() -> None:
    """Scaled pools with heads of 256 on Hopper: the others say whether they take them, and why not."""
    batch = cases.build(cases.Shape(head_dim=256, dtype="bfloat16"), [5, 6], [1, 1])
    batch = batch._replace(cache=cases.quantize(batch.cache, "int8"))
    with pytest.raises(NotImplementedError) as refusal:
        paged_attention(*batch, max_query_len=1, implementation="mosaic_gpu")
    lines = str(refusal.value).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == list(IMPLEMENTATIONS)
    assert "head_dim is 256; with scales it must be 128 at most" in str(refusal.value)


@pytest.mark.parametrize("implementation", ["xla", "cpu_ffi"])
def test_tensor_parallel_equals_one_device(rng: np.random.Generator, implementation: str) -> None:
    """One step of a serving loop inside shard_map: new KV written, then attended; heads sharded, tables replicated."""
    batch = cases.build(cases.Shape(q_heads=8, kv_heads=4), [40, 17, 0], [20, 1, 0])
    slots = batch.page_table[0, :1] * 16 + 5
    k, v = jnp.asarray(rng.standard_normal((2, 1, 4, 64)), jnp.float32)

    def step(batch, k, v, slots):
        cache = cases.Cache(*write_kv(*batch.cache, k, v, slots))
        attended = paged_attention(*batch._replace(cache=cache), max_query_len=20, implementation=implementation)
        return attended, cache

    mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    heads = P(None, "tp")
    specs = cases.Batch(heads, cases.Cache(heads, heads), P(), P(), P())
    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, heads, heads, P()), out_specs=(heads, cases.Cache(heads, heads))
    )
    out, cache = jax.jit(sharded)(batch, k, v, slots)
    expected, expected_cache = step(batch, k, v, slots)
    np.testing.assert_allclose(np.asarray(out)[:21], np.asarray(expected)[:21], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(cache.k), np.asarray(expected_cache.k))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [16, 32], ids=["a token a row", "two tokens a row"])
def test_writes_land_in_their_slots_and_padding_is_dropped(rng: np.random.Generator, dtype: str, size: int) -> None:
    pages, heads, dim = 5, 2, 64
    pools = [jnp.asarray(rng.standard_normal((pages, heads, size, dim)), dtype) for _ in range(2)]
    expected = [np.asarray(pool).copy() for pool in pools]
    slots = np.array([3, -1, 5 * size - 1, size, 2 * size - 1, -5], np.int32)
    new = [jnp.asarray(rng.standard_normal((6, heads, dim)), jnp.float32) for _ in range(2)]
    for pool, x in zip(expected, new, strict=True):
        for token, slot in enumerate(slots):
            if slot >= 0:
                pool[slot // size, :, slot % size] = np.asarray(x[token].astype(dtype))
    kept = [pool.reshape(pool_shape(*pool.shape)) for pool in pools]
    written = jax.jit(write_kv, donate_argnums=(0, 1))(*kept, *new, jnp.asarray(slots))
    for pool, result in zip(expected, written, strict=True):
        np.testing.assert_array_equal(pool, np.asarray(result).reshape(pool.shape))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_donated_pool_is_not_copied(dtype: str) -> None:
    if dtype == "bfloat16" and cpu_library.unavailable() and jax.__version_info__ < (0, 11):
        pytest.skip("XLA:CPU of jax 0.10 copies bfloat16 pools, and the CPU library is not available here")
    pool = jax.ShapeDtypeStruct((256, 2, 16, 64), dtype)
    new, slots = jax.ShapeDtypeStruct((4, 2, 64), jnp.float32), jax.ShapeDtypeStruct((4,), jnp.int32)
    compiled = jax.jit(write_kv, donate_argnums=(0, 1)).lower(pool, pool, new, new, slots).compile()
    page_bytes = 2 * 16 * 64 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * page_bytes


def test_partial_attentions_merge_to_the_whole(rng: np.random.Generator) -> None:
    """Sequence-parallel: pages of a row spread over three parts, merged in either order; one part is empty."""
    shape = cases.Shape(max_pages=6)
    whole = cases.build(shape, [96, 70], [1, 1])
    expected = paged_attention(*whole, max_query_len=1, return_lse=True)
    parts = []
    for first, last in ((0, 2), (2, 3), (3, 6)):
        lengths = jnp.clip(whole.lengths - first * 16, 0, (last - first) * 16)
        part = whole._replace(page_table=whole.page_table[:, first:last], lengths=lengths)
        parts.append(paged_attention(*part, max_query_len=1, return_lse=True))
    nothing = (jnp.full_like(parts[0][0], jnp.nan), jnp.full_like(parts[0][1], -jnp.inf))

    def join(*some):
        return merge(jnp.stack([out for out, _ in some]), jnp.stack([lse for _, lse in some]))

    for out, lse in (join(*parts, nothing), join(join(parts[0], parts[1]), parts[2]), join(parts[0], join(*parts[1:]))):
        np.testing.assert_allclose(out[:2], expected[0][:2], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[:2], expected[1][:2], rtol=1e-6, atol=1e-6)
    out, lse = join(nothing, nothing)
    assert not np.any(out)
    assert np.all(np.isneginf(lse))
