"""Flags of the scripts that run a model, under one name and one meaning."""

from absl import flags

DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    ["float32", "bfloat16", "float16"],
    "Dtype of the weights; by default the one that they are stored in.",
)
