"""The rows that prefill: chunks of queries, a block of them against each block of KV. Bound by the matrix unit."""

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

_BLOCK_TOKENS = 512
# Queries of one KV head's group that share a block of KV: about the operations per byte at which chips balance.
_GROUP_QUERIES = 1024
_MOST_QUERIES = 256
_STATE_BYTES = 24 << 20


def query_block(problem: Problem) -> int:
    """Queries in a block, a power of two: as many as keep the matrix unit busy and fit VMEM."""
    if problem.tile_sizes.prefill_queries is not None:
        return problem.tile_sizes.prefill_queries
    # Of each query head: queries and results twice (one block in flight), queries once more, the sum, and its scale.
    row_bytes = problem.head_dim * (5 * problem.q_dtype.itemsize + 4) + 2 * 4 * stream.LANES
    fits = _STATE_BYTES * stream.cores(problem) // (problem.q_heads * row_bytes)
    most = min(_GROUP_QUERIES // problem.group, _MOST_QUERIES, fits, pl.next_power_of_2(problem.max_query_len))
    return max(1 << (most.bit_length() - 1), 16)


def attend(
    problem: Problem,
    rows: jax.Array,
    blocks: jax.Array,
    count: jax.Array,
    q: jax.Array,
    pools: Pools,
    ragged: Ragged,
) -> tuple[jax.Array, jax.Array]:
    """Attends the queries of some rows.

    Args:
      problem: the whole batch.
      rows: int32 `[items]`: with `blocks`, every pair of a row to attend and a block of `query_block` tokens that
        holds some of its queries, in the order of the blocks; the last of them again after `count`.
      blocks: int32 `[items]`.
      count: int32 `[1]`, how many pairs they are.
      q: `[tokens, q_heads, head_dim]`.
      pools: as everywhere.
      ragged: as everywhere.

    Returns:
      (out `[tokens, q_heads, head_dim]`, lse float32 `[tokens, q_heads]`), written only where those queries are.
    """
    cores = stream.cores(problem)
    tokens, heads, kv_heads, size = (
        problem.tokens,
        problem.q_heads // cores,
        problem.kv_heads // cores,
        problem.head_dim,
    )
    block, rows_per_head = query_block(problem), query_block(problem) * problem.group
    block_tokens = problem.tile_sizes.prefill_keys or _BLOCK_TOKENS
    block_pages = max(min(block_tokens // problem.page_size, problem.max_pages), 1)

    def at_block(core, item, rows, blocks, *_):
        del rows
        return blocks[item], core

    def lse_at_block(core, item, rows, blocks, *_):
        del rows
        return core, blocks[item], 0

    # Heads side by side in the lanes, as projections make them and take them: a head is an aligned slice.
    query = pl.BlockSpec((block, heads * size), at_block)
    lse = pl.BlockSpec((1, block, heads), lse_at_block)
    pools_in_use = stream.pools_in_use(pools)
    call = pl.pallas_call(
        functools.partial(_kernel, problem, block_pages, kv_heads),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(cores, rows.shape[0]),
            in_specs=[query, *[pl.BlockSpec(memory_space=pltpu.HBM)] * len(pools_in_use)],
            out_specs=[query, lse],
            scratch_shapes=[
                pltpu.VMEM((kv_heads, rows_per_head, size), stream.compute_dtype(problem)),
                pltpu.VMEM((kv_heads, rows_per_head, stream.LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows_per_head, stream.LANES), jnp.float32),
                pltpu.VMEM((kv_heads, rows_per_head, size), jnp.float32),
                *stream.scratch_shapes(problem, block_pages, kv_heads),
            ],
        ),
        out_shape=[
            result_type((tokens, problem.q_heads * size), q.dtype, like=q),
            result_type((cores, tokens, heads), jnp.float32, like=q),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=stream.VMEM_LIMIT
        ),
        cost_estimate=_cost(problem, block),
        name="paged_attention_prefill",
        interpret=stream.interpret(),
    )
    table = ragged.page_table.reshape(-1)
    q = q.reshape(tokens, problem.q_heads * size)
    out, lse = call(rows, blocks, count, ragged.lengths, ragged.query_starts, table, q, *pools_in_use)
    return (
        out.reshape(tokens, problem.q_heads, size),
        lse.swapaxes(0, 1).reshape(tokens, problem.q_heads),
    )


def _cost(problem: Problem, block: int) -> pl.CostEstimate:
    """As if every block of queries were one row's, at its longest."""
    blocks, keys = pl.cdiv(problem.tokens, block), stream.most_keys(problem, queries=block)
    pairs = blocks * block * keys * problem.q_heads
    q_bytes = problem.tokens * problem.q_heads * problem.head_dim * problem.q_dtype.itemsize
    return pl.CostEstimate(
        flops=4 * pairs * problem.head_dim,
        transcendentals=pairs,
        bytes_accessed=stream.kv_token_bytes(problem) * keys * blocks + 2 * q_bytes,
    )


def _kernel(problem: Problem, block_pages: int, kv_heads: int, rows, blocks, count, lengths, starts, table, *refs):
    n = 5 if problem.quantized else 3
    (q_ref, *pools), (out_ref, lse_ref, q_scratch, *state), scratch = refs[:n], refs[n : n + 6], refs[n + 6 :]
    peak_ref, total_ref, weighted_ref = state
    item, items = pl.program_id(1), count[0]
    size, group, page_tokens = problem.head_dim, problem.group, stream.page_tokens(problem)
    block, dtype = q_ref.shape[0], q_scratch.dtype
    pages = PageStream(
        problem=problem,
        block_pages=block_pages,
        heads=kv_heads,
        first_head=pl.program_id(0) * kv_heads,
        table=table,
        pools=tuple(pools),
        buffers=tuple(scratch[:-2]),
        arrived=scratch[-2],
        turn=scratch[-1],
    )

    def positions(item):
        """Positions in its row of an item's first query, and of the one after its last."""
        row, token = rows[item], blocks[item] * block
        offset = lengths[row] - starts[row + 1]
        return jnp.maximum(token, starts[row]) + offset, jnp.minimum(token + block, starts[row + 1]) + offset

    def span(item) -> Span:
        first_query, stop = positions(item)
        first = 0
        if problem.sliding_window is not None:
            first = jnp.maximum(first_query - problem.sliding_window + 1, 0) // page_tokens
        return Span(rows[item], first, (stop + page_tokens - 1) // page_tokens)

    @pl.when(item < items)
    def _():
        first_query, stop = positions(item)
        row = rows[item]
        for head in range(kv_heads * group):
            here = (head // group, pl.ds(head % group * block, block))
            q_scratch[*here] = q_ref[:, head * size : (head + 1) * size].astype(dtype)
        peak_ref[...] = jnp.full_like(peak_ref, LOWEST)
        total_ref[...] = jnp.zeros_like(total_ref)
        weighted_ref[...] = jnp.zeros_like(weighted_ref)

        def owned_position(shape):
            """The position of the query in each row of a matrix, -1 where another row of the batch owns it."""
            token = blocks[item] * block + lax.broadcasted_iota(jnp.int32, shape, 0) % block
            position = token + lengths[row] - starts[row + 1]
            return jnp.where((position >= first_query) & (position < stop), position, -1)

        def visit(slot, first_key, nothing):
            pages.clear_rest(slot, stop - first_key)

            def one_head(head, nothing):
                scores = stream.dot(q_scratch[head], pages.keys(slot, head, dtype), 1) * problem.scale
                if (scales := pages.scales(0, slot, head)) is not None:
                    scores = scores * scales
                if problem.soft_cap is not None:
                    scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)
                position = owned_position(scores.shape)
                key = first_key + stream.key_of(problem, scores.shape, block)
                seen = key <= position
                if problem.sliding_window is not None:
                    seen &= key > position - problem.sliding_window
                scores = jnp.where(seen, scores, LOWEST)
                peak = peak_ref[head][:, :1]
                new_peak = jnp.maximum(peak, jnp.max(scores, axis=1, keepdims=True))
                weights = jnp.where(seen, jnp.exp(scores - new_peak), 0.0)
                decay = jnp.exp(peak - new_peak)
                total = total_ref[head][:, :1] * decay + jnp.sum(weights, axis=1, keepdims=True)
                peak_ref[head] = jnp.broadcast_to(new_peak, peak_ref.shape[1:])
                total_ref[head] = jnp.broadcast_to(total, total_ref.shape[1:])
                if (scales := pages.scales(1, slot, head)) is not None:
                    weights = jnp.where(seen, weights * scales, 0.0)
                values = pages.values(slot, head, stop - first_key, dtype)
                weighted_ref[head] = weighted_ref[head] * decay + stream.dot(weights.astype(dtype), values, 0)
                return nothing

            return lax.fori_loop(0, kv_heads, one_head, nothing)

        following = span(jnp.minimum(item + 1, items - 1))
        pages.walk(span(item), following, item == 0, item + 1 == items, visit, 0)

        # The block may hold queries of other rows of the batch too: what they wrote, or will, is theirs.
        owned = owned_position((block, 1)) >= 0
        lse = lse_ref[0]
        column = lax.broadcasted_iota(jnp.int32, lse.shape, 1)
        for head in range(kv_heads * group):
            here = (head // group, pl.ds(head % group * block, block))
            total = total_ref[*here][:, :1]
            divisor = jnp.where(total > 0, total, 1.0)
            lanes = slice(head * size, (head + 1) * size)
            out = jnp.where(owned, weighted_ref[*here] / divisor, out_ref[:, lanes].astype(jnp.float32))
            out_ref[:, lanes] = out.astype(out_ref.dtype)
            head_lse = jnp.where(total > 0, peak_ref[*here][:, :1] + jnp.log(divisor), -jnp.inf)
            lse = jnp.where(owned & (column == head), head_lse, lse)
        lse_ref[0] = lse
