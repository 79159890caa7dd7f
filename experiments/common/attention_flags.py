"""Flags of the scripts that measure paged attention: the sizes that are combined with one another."""

from absl import app, flags

from experiments.common import attention_speed
from experiments.common.flags import define_integers, define_names

DTYPE = define_names("dtype", ["float32", "bfloat16"], attention_speed.KV_DTYPES, "Dtypes of keys and values.")
SIZES = {
    "batch": define_integers("batch", [8], "Sequences of one call."),
    "context": define_integers("context", [4096], "Tokens of KV of each sequence."),
    "query_len": define_integers("query_len", [1], "Query tokens of each sequence: 1 is decode, more are prefill."),
    "q_heads": define_integers("q_heads", [32], "Query heads of the layer."),
    "kv_heads": define_integers("kv_heads", [8], "KV heads of the layer."),
    "head_dim": define_integers("head_dim", [128], "Values per head of keys and values."),
    "page_size": define_integers("page_size", [64], "Tokens per page of KV."),
}
REPEATS = flags.DEFINE_integer("repeats", 11, "Measurements of each case; the median is reported.", lower_bound=1)


def cases() -> list[attention_speed.Case]:
    """Every combination of the sizes that the flags list. Raises `app.UsageError`."""
    try:
        return attention_speed.cases(dtype=DTYPE.value, **{name: flag.value for name, flag in SIZES.items()})
    except ValueError as error:
        raise app.UsageError(f"These sizes cannot be measured: {error}") from error
