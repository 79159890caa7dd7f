"""Measures the tile sizes of paged attention on this device, and keeps the fastest for every later call.

    python -m experiments.tune_paged_attention --batch=1,32 --context=4096,32768 --q_heads=64

Writes the file of this kind of device in `model/kernels/paged_attention/tuned`, whose README describes it; commit it.
"""

import jax
from absl import app

from experiments.common import attention_flags, attention_speed
from experiments.common.results import start_result, write_result
from experiments.common.script import SEED, run
from experiments.common.tables import print_table
from model.kernels.paged_attention import tuning

_BACKENDS = {"gpu": "mosaic_gpu", "tpu": "pallas_tpu"}


def main() -> None:
    backend = _BACKENDS.get(jax.default_backend())
    if backend is None:
        raise app.UsageError(f"Nothing is tuned on {jax.default_backend()}; run this on a TPU or a Hopper GPU.")
    cases = attention_flags.cases()
    out, meta = start_result()
    entries = attention_speed.tune(cases, backend, attention_flags.REPEATS.value, SEED.value)
    made_by = {name: meta[name] for name in ("command", "versions", "machine", "started_at")}
    path = tuning.write(jax.devices()[0].device_kind, entries, made_by)
    rows = [attention_speed.tuned_row(entry) for entry in entries]
    print_table(rows, title=f"Tile sizes, written to {path}")
    write_result(out, meta, rows)


if __name__ == "__main__":
    run(main)
