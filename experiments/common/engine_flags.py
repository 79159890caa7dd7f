"""Flags that size an engine, under one name, one meaning and one default for every script that builds an engine."""

import jax
from absl import flags

from experiments.common.flags import define_float
from experiments.common.script import SEED
from model.kernels.paged_attention import IMPLEMENTATIONS
from serving.engine import EngineConfig

PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "Tokens per page of KV.", lower_bound=1)
NUM_PAGES = flags.DEFINE_integer("num_pages", None, "Pages of KV; by default what --kv_gib holds.", lower_bound=1)
KV_GIB = define_float(
    "kv_gib", None, "GiB of KV over all devices; by default what is free, 1 GiB on CPU.", lower_bound=1e-9
)
KV_DTYPE = flags.DEFINE_enum(
    "kv_dtype", None, ["float32", "bfloat16", "float16"], "Dtype of KV; by default the model's."
)
MAX_BATCH = flags.DEFINE_integer("max_batch", 32, "Most sequences that decode in one step.", lower_bound=1)
TOKEN_BUDGET = flags.DEFINE_integer("token_budget", 512, "Most tokens computed in one step.", lower_bound=1)
MAX_PREFILL_ROWS = flags.DEFINE_integer(
    "max_prefill_rows", 8, "Most prompts that are prefilled in one step.", lower_bound=1
)
MAX_MODEL_LEN = flags.DEFINE_integer(
    "max_model_len", None, "Most tokens of a request, prompt and output; by default the model's limit.", lower_bound=1
)
PREFIX_CACHE = flags.DEFINE_bool("prefix_cache", True, "Reuse the KV of equal prefixes.")
ATTENTION = flags.DEFINE_enum(
    "attention", None, IMPLEMENTATIONS, "Paged-attention backend; by default the fastest that runs here."
)
DETERMINISTIC = flags.DEFINE_bool(
    "deterministic", False, "Same bits for a request whatever else is served; --token_budget must hold whole pages."
)
COMPILATION_CACHE = flags.DEFINE_string(
    "compilation_cache", ".jax_cache", "Folder that keeps compiled steps for the next start; empty keeps none."
)


def engine_config() -> EngineConfig:
    """The engine that the flags ask for. Raises `EngineError`."""
    return EngineConfig(
        page_size=PAGE_SIZE.value,
        num_pages=NUM_PAGES.value,
        kv_bytes=None if KV_GIB.value is None else int(KV_GIB.value * 2**30),
        max_batch=MAX_BATCH.value,
        token_budget=TOKEN_BUDGET.value,
        max_prefill_rows=MAX_PREFILL_ROWS.value,
        max_model_len=MAX_MODEL_LEN.value,
        prefix_cache=PREFIX_CACHE.value,
        kv_dtype=KV_DTYPE.value,
        attention=ATTENTION.value,
        seed=SEED.value,
        deterministic=DETERMINISTIC.value,
    )


def keep_compiled_steps() -> None:
    """Lets JAX read and write compiled steps in the folder of `--compilation_cache`."""
    if COMPILATION_CACHE.value:
        jax.config.update("jax_compilation_cache_dir", COMPILATION_CACHE.value)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
