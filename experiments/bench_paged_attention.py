"""Speed of paged attention, by backend and shape, beside what the same machine reads, copies or multiplies.

    python -m experiments.bench_paged_attention --dtype=float32,bfloat16 --batch=1,8 --context=4096
    python -m experiments.bench_paged_attention --batch=1 --context=2048 --query_len=2048

One query per row is decode, whose ceiling is bandwidth: a read by all cores on CPU, a large copy elsewhere. More are
prefill, whose ceiling is a large matrix product. Every list of sizes is combined with every other.
"""

from collections.abc import Sequence

import jax
from absl import app, flags, logging

from experiments.common import attention_peers, attention_speed, results
from experiments.common.flags import SEED, out_folder
from experiments.common.process import with_huge_pages
from model.kernels.paged_attention import IMPLEMENTATIONS

_BACKENDS = ("auto", *IMPLEMENTATIONS, attention_speed.JAX_TRITON, *attention_peers.TORCH_PEERS)
# On a CPU these are simulated, for tests.
_HOMES = {"mosaic_gpu": "gpu", "pallas_tpu": "tpu"}

BACKEND = flags.DEFINE_list("backend", ["auto"], f"Of {', '.join(_BACKENDS)}; `auto` is what a model gets.")
DTYPE = flags.DEFINE_list(
    "dtype", ["float32", "bfloat16"], f"Of keys and values: {', '.join(attention_speed.KV_DTYPES)}."
)
SIZES = {
    name: flags.DEFINE_list(name, [default], text)
    for name, default, text in (
        ("batch", "8", "Rows."),
        ("context", "4096", "Tokens of KV of each row."),
        ("query_len", "1", "Queries of each row: 1 is decode."),
        ("q_heads", "32", "Query heads."),
        ("kv_heads", "8", "KV heads."),
        ("head_dim", "128", "Values per head."),
        ("page_size", "64", "Tokens of a page."),
    )
}
REPEATS = flags.DEFINE_integer("repeats", 11, "Measurements; the median is reported.", lower_bound=1)


def cases() -> list[attention_speed.Case]:
    """Every combination of the sizes that the flags list."""
    try:
        sizes = {name: [int(value) for value in flag.value] for name, flag in SIZES.items()}
        return attention_speed.cases(dtype=DTYPE.value, **sizes)
    except ValueError as error:
        raise app.UsageError(f"These sizes cannot be measured: {error}") from error


def _check_backends() -> None:
    platform = jax.default_backend()
    for name in BACKEND.value:
        if name not in _BACKENDS:
            raise app.UsageError(f"--backend={name} is unknown; give some of {', '.join(_BACKENDS)}.")
        if _HOMES.get(name, platform) != platform:
            raise app.UsageError(f"--backend={name} is no measure on {platform}; run it on a {_HOMES[name]}.")


def main(argv: Sequence[str]) -> None:
    if argv[1:]:
        raise app.UsageError(f"Unexpected arguments {argv[1:]}; see --help.")
    with_huge_pages()
    _check_backends()
    to_measure, out = cases(), out_folder("bench_paged_attention")
    meta = results.start_meta(
        {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(argv[0])}, SEED.value
    )
    rows, left_out = attention_speed.run_benchmark(to_measure, BACKEND.value, REPEATS.value, SEED.value)
    for what, reason in left_out.items():
        logging.warning("Left out %s: %s", what, reason)
    results.print_table(rows, title=f"Paged attention on {jax.devices()[0].device_kind}")
    results.write_result(out, meta, rows, {"left_out": left_out})


if __name__ == "__main__":
    app.run(main)
