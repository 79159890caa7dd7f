"""Pages out of a pool and into another: the same bits, no copy of the pool, no compilation, no reused host memory."""

import dataclasses
import mmap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, Sharding

from kvcache import moves
from kvcache.errors import KVCacheError
from kvcache.kv_block import KVBlock
from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache
from model.kernels.paged_attention import cpu_library
from model.sharding import KV_SPEC, parse_mesh
from serving.engine.compiles import compiles
from tests import ahead_of_time

LAYOUT = KVLayout(num_layers=3, num_pages=20, page_size=16, num_kv_heads=2, head_dim=16)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
every_head = pytest.mark.parametrize(("head_dim", "page_size"), [(16, 16), (64, 64), (128, 16)])


def placements() -> dict[str, Sharding]:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"one device": device, "tp:2": NamedSharding(parse_mesh("tp:2"), KV_SPEC)}


every_placement = pytest.mark.parametrize("placement", ["one device", "tp:2"])


def filled(
    layout: KVLayout, placement: str = "one device", seed: int = 0
) -> tuple[PagedKVCache, np.ndarray, np.ndarray]:
    """A cache of random KV, and its two pools as NumPy arrays `[layer, page, ...]`."""
    sharding = placements()[placement]
    empty = PagedKVCache.create(layout, sharding)
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=empty.k.shape).astype(empty.k.dtype) for _ in range(2))
    cache = PagedKVCache(*(jax.device_put(x.copy(), sharding) for x in (k, v)), layout)
    return cache, *(x.reshape(layout.num_layers, layout.num_pages, *x.shape[1:]) for x in (k, v))


def pools(cache: PagedKVCache) -> list[np.ndarray]:
    layout = cache.layout
    return [np.array(x).reshape(layout.num_layers, layout.num_pages, *x.shape[1:]) for x in (cache.k, cache.v)]


@every_placement
@every_dtype
@every_head
@pytest.mark.parametrize("by_way_of", ["host", "device"])
def test_a_block_arrives_bit_for_bit(placement: str, dtype: str, head_dim: int, page_size: int, by_way_of: str) -> None:
    layout = dataclasses.replace(LAYOUT, head_dim=head_dim, page_size=page_size, dtype=dtype)
    source, source_k, source_v = filled(layout, placement)
    target, target_k, target_v = filled(dataclasses.replace(layout, num_pages=30), placement, seed=1)
    pages, there, layers = [7, 0, 19], [29, 3, 4], range(1, 3)
    block = moves.extract(source, pages, layers)
    assert block.nbytes == layout.page_bytes * 3 * 2 // 3
    if by_way_of == "host":
        block = block.to_host()
        assert block.k.shape[:2] == (3, 2)
    target, done = moves.insert(target, there, block)
    jax.block_until_ready(done)
    assert target.k.sharding == target.v.sharding == placements()[placement]
    for before, pool, out in ((target_k, source_k, target.k), (target_v, source_v, target.v)):
        expected = before.copy()
        for layer in layers:
            expected[layer, there] = pool[layer, pages]
        np.testing.assert_array_equal(np.array(out).reshape(expected.shape), expected)


def test_a_block_of_a_whole_pool_enters_one_that_is_split_over_devices() -> None:
    source, k, _ = filled(LAYOUT)
    block = moves.extract(source, [4, 5], range(3)).to_host()
    target, _ = moves.insert(PagedKVCache.create(LAYOUT, placements()["tp:2"]), [0, 1], block)
    back = moves.extract(target, [0, 1], range(3)).to_host()
    np.testing.assert_array_equal(back.k, k[:, [4, 5]].swapaxes(0, 1))


def test_steps_that_come_later_do_not_change_a_block() -> None:
    cache, k, _ = filled(LAYOUT)
    block = moves.extract(cache, [3], range(3))
    step = jax.jit(lambda cache: jax.tree.map(lambda x: x * 2, cache), donate_argnums=0)
    cache = step(cache)
    np.testing.assert_array_equal(block.to_host().k[0], k[:, 3])


def test_a_slot_that_is_held_until_done_may_be_overwritten_behind_a_queued_step() -> None:
    """Without the hold the bytes of later blocks arrive: the write still waits for the step, and nothing was copied."""
    layout = dataclasses.replace(LAYOUT, num_pages=256, page_size=64, head_dim=64)
    cache, *_ = filled(layout)
    cache = moves.warm_up(cache, 4, 3)
    work = jnp.ones((900, 900))

    @jax.jit
    def slow(cache: PagedKVCache, work: jax.Array) -> PagedKVCache:
        for _ in range(3):
            work = work @ work * 1e-3
        return dataclasses.replace(cache, k=cache.k.at[0].add(work[0, 0]))

    slow = jax.jit(slow, donate_argnums=0)
    slot = moves.extract(cache, [0, 1, 2, 3], range(3)).to_host()
    memory = np.frombuffer(mmap.mmap(-1, slot.nbytes), slot.k.dtype).reshape(2, *slot.k.shape)  # as a host tier's
    slot = dataclasses.replace(slot, k=memory[0], v=memory[1])
    for turn in range(1, 9):
        slot.k[:], slot.v[:] = turn, -turn
        cache = slow(cache, work)
        cache, done = moves.insert(cache, [4 * turn, 4 * turn + 1, 4 * turn + 2, 4 * turn + 3], slot)
        while not done.is_ready():
            time.sleep(1e-4)
    k, v = pools(cache)
    for turn in range(1, 9):
        assert (k[:, 4 * turn : 4 * turn + 4] == turn).all()
        assert (v[:, 4 * turn : 4 * turn + 4] == -turn).all()


@every_placement
def test_nothing_is_compiled_after_warm_up(placement: str) -> None:
    layout = dataclasses.replace(LAYOUT, num_pages=19)
    cache, k, v = filled(layout, placement)
    cache = moves.warm_up(cache, 6, 3)
    np.testing.assert_array_equal(pools(cache), [k, v])
    before = compiles()
    for count in range(1, 9):
        block = moves.extract(cache, list(range(count)), range(3))
        cache, done = moves.insert(cache, list(range(9, 9 + count)), block)
        cache, done = moves.insert(cache, list(range(9, 9 + count)), block.to_host())
        jax.block_until_ready(done)
    assert compiles() == before


def abstract(
    layout: KVLayout, sharding: Sharding | None, pages: int
) -> tuple[PagedKVCache, list[jax.ShapeDtypeStruct]]:
    """The shapes of a cache, and of K and V of a block and its rows."""
    cache = jax.eval_shape(lambda: PagedKVCache.create(layout))
    block = None if sharding is None else moves.block_sharding(sharding)
    page = (pages, layout.num_layers, *cache.k.shape[1:])
    arrays = [jax.ShapeDtypeStruct(page, cache.k.dtype, sharding=block)] * 2
    rows = jax.ShapeDtypeStruct(page[:2], jnp.int32)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), cache)
    return placed, [*arrays, rows]


def temp_bytes(layout: KVLayout, sharding: Sharding) -> tuple[int, int]:
    """Scratch memory of moves of 8 pages, out and in."""
    cache, (k, v, rows) = abstract(layout, sharding, 8)
    out = moves.gather(sharding).lower(cache, rows).compile().memory_analysis()
    into = moves.scatter(sharding).lower(cache, k, v, rows).compile().memory_analysis()
    return out.temp_size_in_bytes, into.temp_size_in_bytes


def large(head_dim: int, dtype: str) -> KVLayout:
    return dataclasses.replace(LAYOUT, num_pages=2048, page_size=64, head_dim=head_dim, num_kv_heads=8, dtype=dtype)


@every_dtype
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("mesh", [None, "tp:8"])
def test_the_pool_is_never_copied_on_cpu(mesh: str | None, head_dim: int, dtype: str) -> None:
    if dtype == "bfloat16" and jax.__version_info__ < (0, 11) and (reason := cpu_library.unavailable()):
        pytest.skip(f"XLA:CPU of jax 0.10 copies a bfloat16 pool to write it, and ours cannot: {reason}")
    layout = large(head_dim, dtype)
    sharding = NamedSharding(parse_mesh(mesh), KV_SPEC) if mesh else placements()["one device"]
    block = 8 * layout.page_bytes
    assert max(temp_bytes(layout, sharding)) <= block < layout.num_pages * layout.page_bytes / 20


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("platform", "chip"), [("tpu", "v6e:2x2"), ("cuda", "h200")])
def test_the_pool_is_never_copied_on_accelerators(platform: str, chip: str, head_dim: int, dtype: str) -> None:
    ahead_of_time.skip_without_compiler(platform)
    layout = large(head_dim, dtype)
    with ahead_of_time.no_accelerator_here():
        mesh = jax.sharding.Mesh(np.array(ahead_of_time.devices_of(platform, chip)[:1]), ("tp",))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            sharding = NamedSharding(mesh, KV_SPEC)
            cache, (k, v, rows) = abstract(layout, sharding, 8)
            for move, arguments in (
                (moves.gather(sharding), (cache, rows)),
                (moves.scatter(sharding), (cache, k, v, rows)),
            ):
                compiled = move.trace(*arguments).lower(lowering_platforms=(platform,)).compile()
                assert compiled.memory_analysis().temp_size_in_bytes <= 8 * layout.page_bytes


def test_what_does_not_fit_is_refused() -> None:
    cache, *_ = filled(LAYOUT)
    for pages, layers, message in (
        ([], range(3), "at least one"),
        ([20], range(3), "pages from 0 to 19"),
        ([-1], range(3), "pages from 0 to 19"),
        ([0], range(2, 4), "layers from 0 to 2"),
    ):
        with pytest.raises(KVCacheError, match=message):
            moves.extract(cache, pages, layers)
    block = moves.extract(cache, [1, 2], range(3))
    with pytest.raises(KVCacheError, match=r"a block of 2 pages, float32.* does not fit 3 pages"):
        moves.insert(cache, [1, 2, 3], block)
    other, *_ = filled(dataclasses.replace(LAYOUT, dtype="bfloat16"))
    with pytest.raises(KVCacheError, match="insert it into a pool of the layout it comes from"):
        moves.insert(other, [1, 2], block)


def test_a_block_is_a_pytree() -> None:
    block = moves.extract(filled(LAYOUT)[0], [1, 2, 3], range(1, 2))
    doubled = jax.tree.map(lambda x: x * 2, block)
    assert isinstance(doubled, KVBlock)
    assert (doubled.num_pages, doubled.layers) == (3, range(1, 2))
    jax.block_until_ready(block)
    assert block.is_ready()
    assert block.to_host().is_ready()
