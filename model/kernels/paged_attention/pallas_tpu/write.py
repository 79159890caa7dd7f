"""The KV of chunks, written into the pools page by page: each page that a chunk touches is read, mixed and sent back.

XLA writes such rows one by one, eight per token. Fused into the prefill kernel the write would move about as much: that
kernel is bound by the matrix unit, and reads the pages of its own chunk once more for each later block of queries.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.kernels.paged_attention.manual import result_type
from model.kernels.paged_attention.pallas_tpu import stream
from model.kernels.paged_attention.problem import NewKV, Pools, Problem, Ragged


def most_pages(problem: Problem) -> int:
    """Pages that the chunks of a batch touch at most: every chunk, of two tokens or more, may begin and end in one."""
    return problem.tokens // stream.page_tokens(problem) + 2 * min(problem.rows, max(problem.tokens // 2, 1))


def write(
    problem: Problem,
    rows: jax.Array,
    indices: jax.Array,
    count: jax.Array,
    new: NewKV,
    pools: Pools,
    ragged: Ragged,
) -> Pools:
    """Writes the KV of some rows' queries to where the page table puts them; in place where the pools are donated.

    Args:
      problem: the whole batch.
      rows: int32 `[items]`: with `indices`, every pair of a row to write and a page of its table that some of its
        queries go to; the last of them again after `count`.
      indices: int32 `[items]`.
      count: int32 `[1]`, how many pairs they are.
      new: `[tokens, kv_heads, head_dim]`, the KV of all queries.
      pools: as everywhere, of unscaled values.
      ragged: as everywhere.
    """
    size, width = stream.page_tokens(problem), problem.kv_heads * problem.head_dim
    last_block = (problem.tokens - 1) // size

    def first_token(item, rows, indices, lengths, starts):
        """The token in `new` that goes to the first slot of an item's page; may be of another row, or negative."""
        row = rows[item]
        return indices[item] * size - lengths[row] + starts[row + 1]

    def at_block(nth, item, rows, indices, count, lengths, starts, table):
        del count, table
        return jnp.clip(first_token(item, rows, indices, lengths, starts) // size + nth, 0, last_block), 0

    def at_page(item, rows, indices, count, lengths, starts, table):
        del count, lengths, starts
        return jnp.clip(table[rows[item] * problem.max_pages + indices[item]], 0, problem.pages - 1), 0, 0, 0

    page = pl.BlockSpec((1, problem.kv_heads, problem.page_size, problem.head_dim), at_page)
    tokens = [pl.BlockSpec((size, width), functools.partial(at_block, nth)) for nth in (0, 1)]
    pool_bytes = problem.tokens * width * problem.kv_dtype.itemsize
    call = pl.pallas_call(
        functools.partial(_kernel, problem, first_token),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(rows.shape[0],),
            in_specs=[*tokens, *tokens, page, page],
            out_specs=[page, page],
            scratch_shapes=[pltpu.VMEM((size, problem.head_dim), jnp.float32)],
        ),
        out_shape=[result_type(pool.shape, pool.dtype, like=pool) for pool in pools[:2]],
        input_output_aliases={6 + 4: 0, 6 + 5: 1},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",), vmem_limit_bytes=stream.VMEM_LIMIT),
        cost_estimate=pl.CostEstimate(flops=0, transcendentals=0, bytes_accessed=2 * 3 * pool_bytes),
        name="paged_attention_write",
        interpret=stream.interpret(),
    )
    k, v = (x.reshape(problem.tokens, width) for x in new)
    table = ragged.page_table.reshape(-1)
    scalars = (rows, indices, count, ragged.lengths, ragged.query_starts, table)
    written_k, written_v = call(*scalars, k, k, v, v, pools.k, pools.v)
    return pools._replace(k=written_k, v=written_v)


def _kernel(problem: Problem, first_token, rows, indices, count, lengths, starts, table, *refs):
    del table
    *refs, scratch = refs
    size, item = stream.page_tokens(problem), pl.program_id(0)
    row = rows[item]
    first = first_token(item, rows, indices, lengths, starts)
    shift = first % size
    # The two blocks of tokens are rolled until the page's first slot comes first.
    for (early, late), page, out in zip((refs[:2], refs[2:4]), refs[4:6], refs[6:], strict=True):
        for head in range(problem.kv_heads):
            lanes = slice(head * problem.head_dim, (head + 1) * problem.head_dim)
            both = jnp.concatenate([early[:, lanes], late[:, lanes]]).astype(jnp.float32)
            new = pltpu.roll(both, (2 * size - shift) % (2 * size), 0)[:size]
            if problem.row_tokens > 1:
                # Each token comes in all lanes of a row; of every two, one has the first lanes and one the others.
                scratch[...] = new
                even, odd = (scratch[pl.ds(start, size // 2, stride=2)] for start in (0, 1))
                lane = lax.broadcasted_iota(jnp.int32, even.shape, 1)
                new = jnp.where(lane < problem.head_dim // 2, even, odd)
            token = first + stream.token_of(problem, new.shape)
            mine = (token >= starts[row]) & (token < starts[row + 1]) & (count[0] > 0)
            out[0, head] = jnp.where(mine, new, page[0, head].astype(jnp.float32)).astype(out.dtype)
