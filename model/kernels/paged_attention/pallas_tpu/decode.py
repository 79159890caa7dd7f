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
from model.kernels.paged_attention.problem import NewKV, Pools, Problem, Ragged

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
    new: NewKV | None = None,
) -> tuple[jax.Array, ...]:
    """Attends the one query of each of some rows.

    Args:
      problem: the whole batch.
      rows: int32 `[items]`, the rows to attend, ascending; the last of them again after `count`.
      count: int32 `[1]`, how many they are.
      q: `[n, q_heads, head_dim]`.
      queries: int32 `[rows]`, ascending: which of `q` is whose.
      pools: as everywhere.
      ragged: as everywhere.
      new: keys and values of the rows' last tokens, `[n, kv_heads, head_dim]` beside `q`, which the pools do not hold
        yet: the kernel brings a row's last page to VMEM anyway, puts them in there and sends the page's tile back.

    Returns:
      (out `[n, q_heads, head_dim]`, lse float32 `[n, q_heads]`), written only where those queries are; with `new` also
      the two pools, which are the same memory where they are donated.
    """
    cores = stream.cores(problem)
    tokens, heads, kv_heads = q.shape[0], problem.q_heads // cores, problem.kv_heads // cores
    token_bytes = kv_heads * problem.head_dim * problem.kv_dtype.itemsize
    block_rows = problem.tile_sizes.decode_keys or min(_BLOCK_BYTES // token_bytes, _BLOCK_TOKENS)
    block_rows = min(block_rows, problem.max_pages * problem.page_size)
    block_pages = max(block_rows // problem.page_size, 1)

    def at_query(core, item, rows, count, lengths, queries, table):
        del count, lengths, table
        return queries[rows[item]], core, 0, 0

    query = pl.BlockSpec((1, 1, heads, problem.head_dim), at_query)
    lse = pl.BlockSpec((1, 1, 1, heads), at_query)
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    pools_in_use = stream.pools_in_use(pools)
    new_kv = [] if new is None else [x.reshape(tokens, cores, kv_heads, problem.head_dim) for x in new]
    written = [] if new is None else [pools.k, pools.v]
    first_pool = 5 + 1 + len(new_kv)
    call = pl.pallas_call(
        functools.partial(_kernel, problem, block_pages, kv_heads, new is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(cores, rows.shape[0]),
            in_specs=[
                query,
                *[pl.BlockSpec((1, 1, kv_heads, problem.head_dim), at_query)] * len(new_kv),
                *[in_hbm] * len(pools_in_use),
            ],
            out_specs=[query, lse, *[in_hbm] * len(written)],
            scratch_shapes=[
                *stream.scratch_shapes(problem, block_pages, kv_heads),
                *[pltpu.SemaphoreType.DMA(())] * (new is not None),
            ],
        ),
        out_shape=[
            result_type((tokens, cores, heads, problem.head_dim), q.dtype, like=q),
            result_type((tokens, cores, 1, heads), jnp.float32, like=q),
            *[result_type(pool.shape, pool.dtype, like=pool) for pool in written],
        ],
        input_output_aliases={first_pool + i: 2 + i for i in range(len(written))},
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=stream.VMEM_LIMIT
        ),
        cost_estimate=_cost(problem, q, new is not None),
        name="paged_attention_decode",
        interpret=stream.interpret(),
    )
    table = ragged.page_table.reshape(-1)
    out, lse, *written = call(
        rows,
        count,
        ragged.lengths,
        queries,
        table,
        q.reshape(tokens, cores, heads, problem.head_dim),
        *new_kv,
        *pools_in_use,
    )
    return out.reshape(q.shape), lse.reshape(q.shape[:2]), *written


def _cost(problem: Problem, q: jax.Array, writes: bool) -> pl.CostEstimate:
    """As if every row decoded at its longest, but for those that as few as possible full chunks take."""
    chunks = -(-max(problem.tokens - problem.rows, 0) // max(problem.max_query_len - 1, 1))
    rows = problem.rows - min(chunks, problem.rows)
    keys = rows * stream.most_keys(problem, queries=1)
    # A token comes in, and the tile that it is in goes out.
    written = rows * (1 + stream.tile_rows(problem)) if writes else 0
    return pl.CostEstimate(
        flops=4 * problem.q_heads * problem.head_dim * keys,
        transcendentals=problem.q_heads * keys,
        bytes_accessed=stream.kv_token_bytes(problem) * (keys + written)
        + q.size * (2 * q.dtype.itemsize)
        + 4 * q.shape[0],
    )


def _kernel(
    problem: Problem,
    block_pages: int,
    kv_heads: int,
    writes: bool,
    rows,
    count,
    lengths,
    queries,
    table,
    q_ref,
    *refs,
):
    del queries
    new, refs = refs[: (n := 2 if writes else 0)], refs[n:]
    pools, (out_ref, lse_ref, *scratch) = refs[: (n := 4 if problem.quantized else 2)], refs[n:]
    if writes:
        # The pools that come out are those that come in, now or once: all reads see what was written.
        pools, scratch, written = scratch[:2], scratch[2:-1], scratch[-1]
    item, items = pl.program_id(1), count[0]
    heads, head_dim = q_ref.shape[2:]
    group, dtype, page_tokens = heads // kv_heads, stream.compute_dtype(problem), stream.page_tokens(problem)
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

    def span(item) -> Span:
        row = rows[item]
        first = 0
        if problem.sliding_window is not None:
            first = jnp.maximum(lengths[row] - problem.sliding_window, 0) // page_tokens
        return Span(row, first, (lengths[row] + page_tokens - 1) // page_tokens)

    @pl.when(item < items)
    def _():
        length = lengths[rows[item]]
        q = q_ref[0, 0].astype(dtype)

        page = table[rows[item] * problem.max_pages + (length - 1) // page_tokens]
        offset = (length - 1) % page_tokens

        def visit(slot, first_key, state):
            peak, total, weighted = state
            valid = length - first_key
            if writes:

                @pl.when(valid <= pages.block_tokens)
                def _append():
                    pages.append(slot, (valid - 1) // page_tokens, offset, *(x.at[0, 0] for x in new))

            pages.clear_rest(slot, valid)
            if writes:

                @pl.when(valid <= pages.block_tokens)
                def _write_back():
                    for copy in pages.write_back(slot, (valid - 1) // page_tokens, page, offset, written):
                        copy.start()

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
            key = stream.key_of(problem, scores.shape, 1)
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
        if writes:
            for copy in pages.write_back(0, 0, page, offset, written):
                copy.wait()
        # Queries of one parity see nothing where the row has one token.
        divisor = jnp.where(total > 0, total, 1.0)
        lse = jnp.where(total > 0, peak + jnp.log(divisor), -jnp.inf)
        out_ref[0, 0] = (weighted / divisor).astype(out_ref.dtype)
        # A column into a row, without a transposition.
        row, column = (lax.broadcasted_iota(jnp.int32, (heads, heads), axis) for axis in (0, 1))
        lse_ref[0, 0] = jnp.sum(jnp.where(row == column, lse, 0.0), axis=0, keepdims=True)


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
