"""How fast KV blocks leave the pool and enter it (`kvcache.moves`), beside a memcpy of as many bytes in the same run.

    python -m experiments.bench_moves --block_mib=1,4,16

The pool is that of a model of 8 layers with 4 KV heads of 64, in pages of 64 tokens.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

from experiments.common.flags import define_integers
from experiments.common.process import with_huge_pages
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from kvcache import moves
from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache

BLOCKS = define_integers("block_mib", [1, 4, 16], "Sizes of a KV block in MiB; a page of float32 takes 1 MiB.")
POOL_MIB = flags.DEFINE_integer("pool_mib", 512, "Size of the KV pool in MiB.", lower_bound=64)
KV_DTYPE = flags.DEFINE_enum("kv_dtype", "float32", ["float32", "bfloat16"], "Dtype of the KV pool.")
REPEATS = flags.DEFINE_integer(
    "repeats", 100, "Measurements of each move; the least and the median are reported.", lower_bound=1
)


def _times(work: Callable[[], object]) -> dict[str, float]:
    times = []
    for _ in range(REPEATS.value + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return {"least_s": min(times[1:]), "median_s": statistics.median(times[1:])}


class _Bench:
    """One pool, and one slot of host memory to copy blocks to and from."""

    def __init__(self, layout: KVLayout, pages: int) -> None:
        self._cache = PagedKVCache.create(layout, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        rng = np.random.default_rng(SEED.value)
        self._pages = rng.permutation(layout.num_pages)[:pages].tolist()
        self._layers = range(layout.num_layers)
        block = moves.extract(self._cache, self._pages, self._layers).to_host()
        self._slot, self._other_slot = (jax.tree.map(np.array, block) for _ in range(2))

    def memcpy(self) -> None:
        jax.tree.map(np.copyto, self._slot, self._other_slot)

    def gather(self) -> None:
        jax.block_until_ready(moves.extract(self._cache, self._pages, self._layers))

    def out(self) -> None:
        block = moves.extract(self._cache, self._pages, self._layers).to_host()
        jax.tree.map(np.copyto, self._slot, block)

    def into(self) -> None:
        self._cache, done = moves.insert(self._cache, self._pages, self._slot)
        jax.block_until_ready(done)


def main() -> None:
    with_huge_pages()
    out, meta = start_result()
    sizes = KVLayout(num_layers=8, num_pages=1, page_size=64, num_kv_heads=4, head_dim=64, dtype=KV_DTYPE.value)
    layout = dataclasses.replace(sizes, num_pages=(POOL_MIB.value << 20) // sizes.page_bytes)
    rows = []
    for mib in tqdm(BLOCKS.value, desc="blocks"):
        pages = (mib << 20) // layout.page_bytes
        if not 0 < pages <= layout.num_pages:
            raise app.UsageError(f"--block_mib={mib} is no block of pages of {layout.page_bytes} bytes in this pool.")
        bench = _Bench(layout, pages)
        copied = _times(bench.memcpy)
        for move, work in (("gather", bench.gather), ("gather and copy to a slot", bench.out), ("insert", bench.into)):
            times = _times(work)
            row = {"move": move, "block_bytes": pages * layout.page_bytes} | times
            rows.append(row | {"memcpy_least_s": copied["least_s"], "per_memcpy": times["least_s"] / copied["least_s"]})
    print_table(rows, title=f"blocks of {layout.dtype} KV, {jax.devices()[0].device_kind}")
    write_result(out, meta, rows)


if __name__ == "__main__":
    run(main)
