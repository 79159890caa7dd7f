"""How fast blocks of KV move between device memory and pinned host memory: what a host tier can reach at best.

    python -m experiments.bench_host_memory --block_mib=1,16,256

On a CPU both are the same memory, and the rate is that of a copy.
"""

import statistics
import time

import jax
import jax.numpy as jnp
from absl import flags
from tqdm import tqdm

from experiments.common.flags import define_integers
from experiments.common.process import with_huge_pages
from experiments.common.results import start_result, write_result
from experiments.common.script import run
from experiments.common.tables import print_table

BLOCKS = define_integers("block_mib", [1, 16, 256], "Sizes of a KV block in MiB.")
REPEATS = flags.DEFINE_integer("repeats", 7, "Measurements of each case; the median is reported.", lower_bound=1)


def _gib_s(block: jax.Array, where: jax.sharding.Sharding) -> float:
    times = []
    for _ in range(REPEATS.value + 1):
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(block, where))
        times.append(time.perf_counter() - start)
    return block.nbytes / statistics.median(times[1:]) / 2**30


def main() -> None:
    with_huge_pages()
    out, meta = start_result()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    host, device = (device.with_memory_kind(kind) for kind in ("pinned_host", "device"))
    rows = []
    for mib in tqdm(BLOCKS.value, desc="blocks"):
        on_device = jax.device_put(jnp.zeros(mib << 20, jnp.uint8), device)
        on_host = jax.device_put(on_device, host)
        for direction, block, where in (("put", on_device, host), ("get", on_host, device)):
            row = {"tier": "pinned_host", "direction": direction, "block_bytes": block.nbytes}
            rows.append(row | {"gib_s": _gib_s(block, where)})
    print_table(rows, title=f"{jax.devices()[0].device_kind} and its host")
    write_result(out, meta, rows)


if __name__ == "__main__":
    run(main)
