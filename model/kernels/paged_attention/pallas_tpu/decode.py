"""The rows that decode: one query each, every head of a KV page at once. Bound by the bandwidth of HBM."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.paged_attention.manual import result_type
from model.kernels.paged_attention.pallas_tpu import stream
from model.kernels.paged_attention.pallas_tpu.stream import LOWEST, PageStream, Span
from model.kernels.paged_attention.problem import Pools, Problem, Ragged

# Of keys, and as much of values, in flight while as much is worked on: latency times bandwidth, with room.
_BLOCK_BYTES = 1 << 20
_BLOCK_TOKENS = 1024


def attend(
    problem: Problem,
    rows: jax.Array,
    count: jax.Array,
    q: jax.Array,
    queries: jax.Array,
    pools: Pools,
    ragged: Ragged,
) -> tuple[jax.Array, jax.Array]:
    """Attends the one query of each of some rows.

    Args:
      problem: the whole batch.
      rows: int32 `[items]`, the rows to attend, ascending; the last of them again after `count`.
      count: int32 `[1]`, how many they are.
      q: `[n, q_heads, head_dim]`.
      queries: int32 `[rows]`, ascending: which of `q` is whose.
      pools: as everywhere.
      ragged: as everywhere.

    Returns:
      (out `[n, q_heads, head_dim]`, lse float32 `[n, q_heads]`), written only where those queries are.
    """
    cores = stream.cores(problem)
    tokens, heads, kv_heads = q.shape[0], problem.q_heads // cores, problem.kv_heads // cores
    token_bytes = kv_heads * problem.head_dim * problem.kv_dtype.itemsize
    block_tokens = min(_BLOCK_BYTES // token_bytes, _BLOCK_TOKENS, problem.max_pages * problem.page_size)
    block_pages = max(block_tokens // problem.page_size, 1)

    def at_query(core, item, rows, count, lengths, queries, table):
        del count, lengths, table
        return queries[rows[item]], core, 0, 0

    query = pl.BlockSpec((1, 1, heads, problem.head_dim), at_query)
    lse = pl.BlockSpec((1, 1, 1, heads), at_query)
    pools_in_use = tuple(pool for pool in pools if pool is not None)
    call = pl.pallas_call(
        functools.partial(_kernel, problem, block_pages, kv_heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, rows.shape[0]),
            in_specs=[query, *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(pools_in_use)],
            out_specs=[query, lse],
            scratch_shapes=stream.scratch_shapes(problem, block_pages, kv_heads),
        ),
        out_shape=[
            result_type((tokens, cores, heads, problem.head_dim), q.dtype, like=q),
            result_type((tokens, cores, 1, heads), jnp.float32, like=q),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=stream.VMEM_LIMIT
        ),
        cost_estimate=_cost(problem, q),
        name="paged_attention_decode",
        interpret=stream.interpret(),
    )
    table = ragged.page_table.reshape(-1)
    out, lse = call(
        rows,
        count,
        ragged.lengths,
        queries,
        table,
        q.reshape(tokens, cores, heads, problem.head_dim),
        *pools_in_use,
    )
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def _cost(problem: Problem, q: jax.Array) -> pl.CostEstimate:
    """As if every row decoded at its longest, but for those that as few as possible full chunks take."""
    chunks = -(-max(problem.tokens - problem.rows, 0) // max(problem.max_query_len - 1, 1))
    keys = (problem.rows - min(chunks, problem.rows)) * stream.most_keys(problem, queries=1)
    return pl.CostEstimate(
        flops=4 * problem.q_heads * problem.head_dim * keys,
        transcendentals=problem.q_heads * keys,
        bytes_accessed=stream.kv_token_bytes(problem) * keys + q.size * (2 * q.dtype.itemsize) + 4 * q.shape[0],
    )


def _kernel(problem: Problem, block_pages: int, kv_heads: int, rows, count, lengths, queries, table, q_ref, *refs):
    del queries
    pools, (out_ref, lse_ref, *scratch) = refs[: (n := 4 if problem.quantized else 2)], refs[n:]
    item, items = pl.program_id(1), count[0]
    heads, head_dim = q_ref.shape[2:]
    group, dtype = heads // kv_heads, stream.compute_dtype(problem)
    pages = PageStream(
        problem, block_pages, kv_heads, pl.program_id(0) * kv_heads, table, pools, tuple(scratch[:-2]), *scratch[-2:]
    )

    def span(item) -> Span:
        row = rows[item]
        first = 0
        if problem.sliding_window is not None:
            first = jnp.maximum(lengths[row] - problem.sliding_window, 0) // problem.page_size
        return Span(row, first, (lengths[row] + problem.page_size - 1) // problem.page_size)

    @pl.when(item < items)
    def _():
        length = lengths[rows[item]]
        q = q_ref[0, 0].astype(dtype)

        def visit(slot, first_key, state):
            peak, total, weighted = state
            valid = length - first_key
            pages.clear_values(slot, valid)
            # All query heads against the keys of each KV head, of which a group's rows count: the matrix unit has rows
            # to spare, and softmax then runs over full registers instead of one group's few rows.
            scores = _by_kv_head(
                [
                    _scaled(stream.dot(q, pages.keys(slot, h, dtype), 1), pages.scales(0, slot, h))
                    for h in range(kv_heads)
                ],
                group,
            )
            scores = scores * problem.scale
            if problem.soft_cap is not None:
                scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)
            key = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            seen = key < valid
            if problem.sliding_window is not None:
                seen &= key >= valid - problem.sliding_window
            scores = jnp.where(seen, scores, LOWEST)
            new_peak = jnp.maximum(peak, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.where(seen, jnp.exp(scores - new_peak), 0.0)
            decay = jnp.exp(peak - new_peak)
            new_total = total * decay + jnp.sum(weights, axis=1, keepdims=True)
            parts = []
            for h in range(kv_heads):
                scaled = _scaled(weights, pages.scales(1, slot, h), seen)
                parts.append(stream.dot(scaled.astype(dtype), pages.values(slot, h, valid, dtype), 0))
            return new_peak, new_total, weighted * decay + _by_kv_head(parts, group)

        nothing = (
            jnp.full((heads, 1), LOWEST, jnp.float32),
            jnp.zeros((heads, 1), jnp.float32),
            jnp.zeros((heads, head_dim), jnp.float32),
        )
        following = span(jnp.minimum(item + 1, items - 1))
        peak, total, weighted = pages.walk(span(item), following, item == 0, item + 1 == items, visit, nothing)
        out_ref[0, 0] = (weighted / total).astype(out_ref.dtype)
        # A column into a row, without a transposition.
        row, column = (lax.broadcasted_iota(jnp.int32, (heads, heads), axis) for axis in (0, 1))
        lse_ref[0, 0] = jnp.sum(jnp.where(row == column, peak + jnp.log(total), 0.0), axis=0, keepdims=True)


def _scaled(x: jax.Array, scales: jax.Array | None, seen: jax.Array | None = None) -> jax.Array:
    """`x` `[M, S]` times the scales `[1, S]`; a slot that was never written may hold NaN, so 0 where not `seen`."""
    if scales is None:
        return x
    return x * scales if seen is None else jnp.where(seen, x * scales, 0.0)


def _by_kv_head(parts: list[jax.Array], group: int) -> jax.Array:
    """Row i from the part of its KV head, `parts[i // group]`."""
    head = lax.broadcasted_iota(jnp.int32, parts[0].shape, 0)
    whole = parts[0]
    for index, part in enumerate(parts[1:], start=1):
        whole = jnp.where(head >= index * group, part, whole)
    return whole
