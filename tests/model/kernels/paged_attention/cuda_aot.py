"""Compiles the Hopper kernels to machine code where there is no GPU; prints one JSON line per case.

A process of its own: the compiler of the CUDA plugin reports what it made on the process's output, and the plugin is
kept away from tests that want CPU devices.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp

from model.kernels.paged_attention import paged_attention, pool_shape, scales_shape, write_and_attend
from tests.ahead_of_time import compile_for
from tests.model.kernels.paged_attention.cases import Batch, Cache, QuantizedCache


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch of 33 rows, to be compiled for one GPU."""

    name: str
    gpu: str = "h200"
    tokens: int = 544
    max_query_len: int = 512
    q_heads: int = 64
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    pages: int = 1024
    dtype: str = "bfloat16"
    kv_dtype: str | None = None
    sliding_window: int | None = None
    soft_cap: float | None = None
    layers: int = 0


CASES = (
    Case("layers", layers=8),
    Case("layers, heads of 64", layers=8, head_dim=64),
    Case("float16 with window and soft cap on h100", gpu="h100", dtype="float16", sliding_window=1000, soft_cap=30.0),
    Case("MHA, head_dim 64, page 128", q_heads=8, head_dim=64, page_size=128),
    Case("page 16", q_heads=32, page_size=16),
    Case("head_dim 256", q_heads=32, head_dim=256),
    Case("int8", kv_dtype="int8"),
    Case("float8, head_dim 64", kv_dtype="float8_e4m3fn", head_dim=64, page_size=32),
    Case("split decode", tokens=1, max_query_len=1),
)


def compile_case(case: Case) -> dict[str, int]:
    """Bytes of one attention, or of `layers` in turn that write their KV and attend it."""
    rows = 33 if case.tokens > 1 else 1
    shape = (max(case.layers, 1) * case.pages, case.kv_heads, case.page_size, case.head_dim)
    pool = jax.ShapeDtypeStruct(pool_shape(*shape) if case.layers else shape, case.kv_dtype or case.dtype)

    def arguments(sharding):
        def like(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        q = like((case.tokens, case.q_heads, case.head_dim), case.dtype)
        pools = [like(pool.shape, pool.dtype)] * 2
        ragged = like((rows, 64), jnp.int32), like((rows,), jnp.int32), like((rows + 1,), jnp.int32)
        scales = [] if case.kv_dtype is None else [like(scales_shape(*shape[:3]), jnp.float32)] * 2
        slots = [like((case.tokens,), jnp.int32)] if case.layers else []
        return [q, *pools, *ragged, *scales, *slots]

    options = {"sliding_window": case.sliding_window, "soft_cap": case.soft_cap, "implementation": "mosaic_gpu"}

    def attend(q, k, v, table, lengths, starts, *scales):
        batch = Batch(q, QuantizedCache(k, v, *scales) if scales else Cache(k, v), table, lengths, starts)
        return paged_attention(*batch, max_query_len=case.max_query_len, return_lse=True, **options)

    def layers(q, k, v, table, lengths, starts, slots):
        cache = Cache(k, v)
        for layer in range(case.layers):
            new = q[:, : case.kv_heads]
            here = slots + layer * case.pages * case.page_size, cache, table + layer * case.pages, lengths, starts
            q, *pools = write_and_attend(q, new, new, *here, max_query_len=case.max_query_len, **options)
            cache = Cache(*pools)
        return q, cache

    compiled = compile_for("cuda", case.gpu, layers if case.layers else attend, arguments, donate=(1, 2))
    bytes_of = compiled.memory_analysis()
    return {"temp": bytes_of.temp_size_in_bytes, "pool": 2 * pool.size * pool.dtype.itemsize}


if __name__ == "__main__":
    for case in CASES:
        sys.stdout.write(json.dumps({"case": case.name} | compile_case(case)) + "\n")
        sys.stdout.flush()
