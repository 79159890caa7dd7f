"""Measures the block sizes of paged attention on this device, and keeps the fastest for every later call.

    python -m experiments.tune_paged_attention --batch=1,32 --context=4096,32768 --q_heads=64

Writes the file of this kind of device in `model/kernels/paged_attention/tuned`, whose README describes it; commit it.
"""

from collections.abc import Sequence

import jax
from absl import app, flags

from experiments import bench_paged_attention as bench
from experiments.common import attention_speed, results
from experiments.common.flags import SEED, out_folder
from model.kernels.paged_attention import tuning

_BACKENDS = {"gpu": "mosaic_gpu", "tpu": "pallas_tpu"}

flags.adopt_module_key_flags(bench)


def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"Unexpected arguments {argv[1:]}; see --help.")
    backend = _BACKENDS.get(jax.default_backend())
    if backend is None:
        raise app.UsageError(f"Nothing is tuned on {jax.default_backend()}; run this on a TPU or a Hopper GPU.")
    cases, out = bench.cases(), out_folder("tune_paged_attention")
    meta = results.start_meta(flags.FLAGS.flag_values_dict(), SEED.value)
    entries = attention_speed.tune(cases, backend, bench.REPEATS.value, SEED.value)
    made_by = {name: meta[name] for name in ("command", "versions", "machine", "started_at")}
    path = tuning.write(jax.devices()[0].device_kind, entries, made_by)
    rows = [attention_speed.tuned_row(entry) for entry in entries]
    results.print_table(rows, title=f"Block sizes, written to {path}")
    results.write_result(out, meta, rows)


if __name__ == "__main__":
    app.run(main)
