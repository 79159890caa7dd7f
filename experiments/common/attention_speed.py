"""The measurements of `bench_paged_attention`: backends, a peer, and what bounds them on the same machine."""

import concurrent.futures
import dataclasses
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from tqdm import tqdm

from experiments.common import attention_peers
from model.kernels.paged_attention import TileSizes, paged_attention, scales_shape, tuning
from model.kernels.paged_attention.problem import Problem, Ragged, pools_of, problem_of

KV_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")
JAX_TRITON = "jax_triton"
"""The peer that comes with jax: its Triton kernel, for GPUs."""

# Kernels of a GPU take less than the host needs to launch them one by one, so so many run in one program.
_CALLS_ON_ACCELERATORS = 50
_READ_BYTES, _COPIED_BYTES = 2**28, 2**33
_MATMUL_SIZE = {"cpu": 1024, "gpu": 8192, "tpu": 8192}

Row = dict[str, Any]


class Cache(NamedTuple):
    """Pools, and the scales of those of one byte."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


class Batch(NamedTuple):
    """The arrays that `paged_attention` takes."""

    q: jax.Array
    cache: Cache
    page_table: jax.Array
    lengths: jax.Array
    query_starts: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """`batch` rows of `context` tokens of KV, whose last `query_len` are the queries."""

    dtype: str
    batch: int
    context: int
    query_len: int
    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int

    def __post_init__(self) -> None:
        if min(dataclasses.astuple(self)[1:]) < 1:
            raise ValueError(f"{self} has a size below 1; give sizes of 1 or more.")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"--q_heads={self.q_heads} is not a multiple of --kv_heads={self.kv_heads}.")
        if self.query_len > self.context:
            raise ValueError(f"--query_len={self.query_len} is more than --context={self.context} holds.")
        if self.dtype not in KV_DTYPES:
            raise ValueError(f"--dtype={self.dtype} is unknown; give some of {', '.join(KV_DTYPES)}.")

    @property
    def q_dtype(self) -> str:
        """Of the queries: that of the pools, bfloat16 where those are of one byte."""
        return self.dtype if jnp.dtype(self.dtype).itemsize > 1 else "bfloat16"

    @property
    def bytes(self) -> int:
        """Keys, values and their scales that any attention reads at least once."""
        scale = 4 if self.dtype != self.q_dtype else 0
        return 2 * self.batch * self.context * self.kv_heads * (self.head_dim * jnp.dtype(self.dtype).itemsize + scale)

    @property
    def flops(self) -> int:
        """Of both products, without what the causal mask leaves out."""
        keys = sum(range(self.context - self.query_len + 1, self.context + 1))
        return 4 * self.batch * self.q_heads * self.head_dim * keys

    def problem(self, batch: Batch) -> Problem:
        """The static side of attending a batch of this case."""
        options = {"scale": None, "sliding_window": None, "soft_cap": None}
        pools, ragged = pools_of(batch.cache), Ragged(*batch[2:])
        return problem_of(batch.q, pools, ragged, max_query_len=self.query_len, **options)

    def build(self, seed: int) -> Batch:
        """Random queries and pools; pages of a row are anywhere in the pool."""
        per_row = -(-self.context // self.page_size)
        pages = self.batch * per_row
        table = np.random.default_rng(seed).permutation(pages).reshape(self.batch, per_row)
        keys = jax.random.split(jax.random.key(seed), 3)
        shape = (pages, self.kv_heads, self.page_size, self.head_dim)
        scale = None
        if self.dtype == self.q_dtype:
            pools = [jax.random.normal(key, shape, self.dtype) for key in keys[:2]]
        else:
            # Any values do, and these fit both kinds of byte.
            pools = [jax.random.randint(key, shape, -127, 128, jnp.int8).astype(self.dtype) for key in keys[:2]]
            scale = jnp.full(scales_shape(*shape[:3]), 1 / 73, jnp.float32)
        tokens = self.batch * self.query_len
        return Batch(
            q=jax.random.normal(keys[2], (tokens, self.q_heads, self.head_dim), self.q_dtype),
            cache=Cache(pools[0], pools[1], scale, scale),
            page_table=jnp.asarray(table, jnp.int32),
            lengths=jnp.full((self.batch,), self.context, jnp.int32),
            query_starts=jnp.arange(self.batch + 1, dtype=jnp.int32) * self.query_len,
        )


def cases(**sizes: Sequence[Any]) -> list[Case]:
    """Every combination of the given values of the fields of `Case`."""
    return [Case(**dict(zip(sizes, values, strict=True))) for values in itertools.product(*sizes.values())]


def run_benchmark(
    cases: Sequence[Case], backends: Sequence[str], repeats: int, seed: int
) -> tuple[list[Row], dict[str, str]]:
    """Rows of every case and backend, and by backend the first case that it was left out of, and why.

    Decode is measured against the bytes per second that this machine reads (CPU) or copies (others), prefill against
    the FLOP/s of a large product in the queries' dtype. Backend and ceiling take turns, and times are medians. KV that
    fits the caches may beat its ceiling.
    """
    rows, left_out = [], {}
    for case in (progress := tqdm(cases, desc="cases")):
        progress.set_postfix_str(f"{case.dtype}, {case.batch} x {case.context}")
        batch = case.build(seed)
        exact = _prepared("xla", case, batch)(1)
        for backend in backends:
            try:
                attend = _prepared(backend, case, batch)
                difference = _difference(attend(1), exact)
            except (NotImplementedError, ImportError, jax.errors.JaxRuntimeError) as refusal:
                if isinstance(refusal, jax.errors.JaxRuntimeError) and not tuning.lacks_memory(refusal):
                    raise
                left_out.setdefault(backend, f"{case}: {str(refusal).splitlines()[0]}")
                continue
            rows.append(_measure(case, backend, attend, repeats) | {"max_difference": difference})
    return rows, left_out


def tune(cases: Sequence[Case], backend: str, repeats: int, seed: int) -> list[tuning.Entry]:
    """The fastest tile sizes of a backend for each case; cases that it has none for are left out."""
    entries = []
    for case in tqdm(cases, desc="cases"):
        batch = case.build(seed)

        def seconds(tile_sizes: TileSizes, case: Case = case, batch: Batch = batch) -> float:
            attend = _prepared(backend, case, batch, tile_sizes)
            (total,) = _medians([lambda: attend(_CALLS_ON_ACCELERATORS)], repeats)
            return total / _CALLS_ON_ACCELERATORS

        try:
            entries.append(tuning.tune(backend, case.problem(batch), seconds))
        except NotImplementedError as refusal:
            logging.warning("Left out %s: %s", case, refusal)
    return entries


def tuned_row(entry: tuning.Entry) -> Row:
    """An entry as a row of a table."""
    chosen = {name: size for name, size in dataclasses.asdict(entry.tile_sizes).items() if size is not None}
    times = {"time_s": entry.time_s, "heuristic_time_s": entry.heuristic_time_s}
    return {**entry.case, "tile_sizes": str(chosen or "heuristic"), **times}


def _measure(case: Case, backend: str, attend: Callable[[int], Any], repeats: int) -> Row:
    calls = 1 if jax.default_backend() == "cpu" else _CALLS_ON_ACCELERATORS
    decodes = case.query_len == 1
    ceiling = _bandwidth() if decodes else _matmul(case.q_dtype)
    seconds, ceiling_seconds = _medians([lambda: attend(calls), ceiling.call], repeats)
    seconds /= calls
    reached = (case.bytes if decodes else case.flops) / seconds
    measured = {
        "time_s": seconds,
        "bytes": case.bytes,
        "gb_s": case.bytes / seconds / 1e9,
        "tflop_s": case.flops / seconds / 1e12,
        "ceiling": f"{ceiling.amount / ceiling_seconds / 1e9:.4g} {ceiling.unit}",
        "fraction_of_ceiling": reached / (ceiling.amount / ceiling_seconds),
    }
    return {"backend": backend} | dataclasses.asdict(case) | measured


def _difference(out: jax.Array, exact: jax.Array) -> float:
    return float(jnp.max(jnp.abs(out.astype(jnp.float32) - exact.astype(jnp.float32))))


def _medians(calls: Sequence[Callable[[], Any]], repeats: int) -> list[float]:
    """Seconds of each call, in turns, after one that compiles."""
    times: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


class Ceiling(NamedTuple):
    """Work that is as fast as this machine goes: what to call, how much that is, and in what unit (times 1e9)."""

    call: Callable[[], Any]
    amount: float
    unit: str


@functools.cache
def _bandwidth() -> Ceiling:
    """A read by as many threads as there are cores, or on an accelerator a copy, whose reads and writes both count."""
    if jax.default_backend() != "cpu":
        source, copy = jnp.zeros(_COPIED_BYTES // 4, jnp.float32), jax.jit(jnp.copy)
        return Ceiling(lambda: copy(source), 2 * _COPIED_BYTES, "GB/s")
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    shares = np.array_split(np.ones(_READ_BYTES // 4, np.float32), threads)
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    return Ceiling(lambda: list(pool.map(lambda share: np.dot(share, share), shares)), _READ_BYTES, "GB/s")


@functools.cache
def _matmul(dtype: str) -> Ceiling:
    size = _MATMUL_SIZE[jax.default_backend()]
    # Of random numbers: chips take less power, and so less time, for equal ones.
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    multiply = jax.jit(lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32).astype(dtype))
    return Ceiling(lambda: multiply(a), 2 * size**3, "GFLOP/s")


def _prepared(
    backend: str, case: Case, batch: Batch, tile_sizes: TileSizes | None = None
) -> Callable[[int], jax.Array]:
    """The attention of a batch by a backend, so many times in a row, each for what the last one gave."""
    if backend in attention_peers.TORCH_PEERS:
        return attention_peers.prepared(backend, batch, case.query_len)
    if backend == JAX_TRITON:
        batch, once = _jax_triton(case, batch)
    else:
        implementation = None if backend == "auto" else backend

        def once(batch: Batch) -> jax.Array:
            options = {"max_query_len": case.query_len, "implementation": implementation, "tile_sizes": tile_sizes}
            out: Any = paged_attention(*batch, **options)
            return out

    def again(_: Any, q: jax.Array, batch: Batch) -> jax.Array:
        # XLA must not think that anything but the pools stays the same, or it gathers pages once for all calls.
        q, table = jax.lax.optimization_barrier((q, batch.page_table))
        return once(batch._replace(q=q, page_table=table))

    @functools.partial(jax.jit, static_argnums=1)
    def attend(batch: Batch, calls: int) -> jax.Array:
        # Some at a time, as a model has layers: a device counts the rounds of a loop in a kernel of its own.
        return jax.lax.fori_loop(
            1, calls, functools.partial(again, batch=batch), once(batch), unroll=max(1, min(calls - 1, 7))
        )

    return functools.partial(attend, batch)


def _jax_triton(case: Case, batch: Batch) -> tuple[Batch, Callable[[Batch], jax.Array]]:
    """The batch as jax's kernel wants it, heads of the pools first and queries scaled; and that kernel."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"The Triton kernel is for GPUs; these devices are {jax.default_backend()}.")
    if case.query_len > 1 or case.dtype != case.q_dtype:
        raise NotImplementedError("The Triton kernel is for one query per row, and KV in the dtype of q.")
    from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention as theirs

    k, v = (pool.swapaxes(0, 1) for pool in batch.cache[:2])
    scaled = batch.q * jnp.asarray(case.head_dim**-0.5, batch.q.dtype)
    splits = next(splits for splits in (16, 8, 4, 2, 1) if batch.page_table.shape[1] % splits == 0)

    def once(batch: Batch) -> jax.Array:
        return theirs(batch.q, *batch.cache[:2], batch.page_table, batch.lengths, k_splits=splits)

    return batch._replace(q=scaled, cache=Cache(k, v)), once
