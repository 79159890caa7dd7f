"""Speed of paged attention, by backend and shape, beside what the same machine reads, copies or multiplies.

    python -m experiments.bench_paged_attention --dtype=float32,bfloat16 --batch=1,8 --context=4096
    python -m experiments.bench_paged_attention --batch=1 --context=2048 --query_len=2048

One query per row is decode, whose ceiling is bandwidth: a read by all cores on CPU, a large copy elsewhere. More are
prefill, whose ceiling is a large matrix product. Every list of sizes is combined with every other.
"""

import jax
from absl import app, logging

from experiments.common import attention_flags, attention_peers, attention_speed
from experiments.common.flags import define_names
from experiments.common.process import with_huge_pages
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.kernels.paged_attention import IMPLEMENTATIONS

_BACKENDS = ("auto", *IMPLEMENTATIONS, attention_speed.JAX_TRITON, *attention_peers.TORCH_PEERS)
# On a CPU these are simulated, for tests.
_HOMES = {"mosaic_gpu": "gpu", "pallas_tpu": "tpu"}

BACKEND = define_names(
    "backend", ["auto"], _BACKENDS, "Implementations to measure; auto is the one that a model gets here."
)


def _check_backends() -> None:
    platform = jax.default_backend()
    for name in BACKEND.value:
        if _HOMES.get(name, platform) != platform:
            raise app.UsageError(f"--backend={name} is no measure on {platform}; run it on a {_HOMES[name]}.")


def main() -> None:
    with_huge_pages()
    _check_backends()
    to_measure = attention_flags.cases()
    out, meta = start_result()
    rows, left_out = attention_speed.run_benchmark(to_measure, BACKEND.value, attention_flags.REPEATS.value, SEED.value)
    for what, reason in left_out.items():
        logging.warning("Left out %s: %s", what, reason)
    print_table(rows, title=f"Paged attention on {jax.devices()[0].device_kind}")
    write_result(out, meta, rows, {"left_out": left_out})


if __name__ == "__main__":
    run(main)
