"""Paged attention and the KV write on TPU, by Pallas kernels for Mosaic; on CPU they run interpreted, for tests."""

import functools

import jax
import jax.numpy as jnp

from model.kernels.paged_attention.manual import vary_alike
from model.kernels.paged_attention.pallas_tpu import decode, prefill, stream, write
from model.kernels.paged_attention.problem import NewKV, Pools, Problem, Ragged

_Q_DTYPES = ("float32", "bfloat16")
_KV_DTYPES = (*_Q_DTYPES, "int8", "float8_e4m3fn", "float8_e5m2")
# The page table and what goes with it sit in scalar memory, which is 1 MiB or less.
_MAX_SCALARS = 160 << 10


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot take the case, or None."""
    if problem.q_dtype.name not in _Q_DTYPES:
        return f"q is {problem.q_dtype}; it must be one of {_Q_DTYPES}."
    if problem.kv_dtype.name not in _KV_DTYPES:
        return f"the pools are {problem.kv_dtype}; they must be one of {_KV_DTYPES}."
    if problem.head_dim % 64 or problem.head_dim > 256:
        return f"head_dim is {problem.head_dim}; it must be a multiple of 64 up to 256."
    if problem.page_size % (16 * problem.row_tokens):
        return f"page_size is {problem.page_size}; it must be a multiple of {16 * problem.row_tokens}."
    if problem.quantized and stream.LANES % problem.page_size and problem.page_size % stream.LANES:
        return f"page_size is {problem.page_size}; for scaled pools it must divide {stream.LANES}, or be a multiple."
    if problem.rows * problem.max_pages > _MAX_SCALARS:
        return f"the page table is [{problem.rows}, {problem.max_pages}]; at most {_MAX_SCALARS} entries fit SMEM."
    return None


@functools.partial(jax.jit, static_argnums=0)
def attend(problem: Problem, q: jax.Array, pools: Pools, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
    """Returns (out `[tokens, q_heads, head_dim]` in q's dtype, lse float32 `[tokens, q_heads]`).

    Jitted, so that the layers of a model trace and lower it once.
    """
    q, *rest = vary_alike(q, *(pool for pool in pools if pool is not None), *ragged)
    out, lse, _ = _attend_rows(problem, q, None, Pools(*rest[:-3]), Ragged(*rest[-3:]))
    return out, lse


@functools.partial(jax.jit, static_argnums=0)
def write_and_attend(
    problem: Problem, q: jax.Array, new: NewKV, pools: Pools, ragged: Ragged
) -> tuple[jax.Array, jax.Array, Pools]:
    """`attend` of queries whose own KV, `new`, is not in the pools yet; and the pools with it, in place if donated."""
    q, *rest = vary_alike(q, *new, *pools[:2], *ragged)
    return _attend_rows(problem, q, NewKV(*rest[:2]), Pools(*rest[2:4]), Ragged(*rest[4:]))


def _attend_rows(problem: Problem, q: jax.Array, new: NewKV | None, pools: Pools, ragged: Ragged):
    """`_attend`, of two tokens a row where the pools are kept so."""
    if problem.row_tokens == 1:
        return _attend(problem, q, new, pools, ragged)
    if new is not None:
        new = NewKV(*(jnp.concatenate([x, x], 2) for x in new))
    out, lse, pools = _attend(stream.packed(problem), stream.spread(problem, q), new, pools, ragged)
    return *stream.joined(problem, out, lse), pools


def _attend(problem: Problem, q: jax.Array, new: NewKV | None, pools: Pools, ragged: Ragged):
    """Decode rows by one kernel, chunks by another; neither moves a page for the rows of the other."""
    starts, counts = ragged.query_starts[:-1], jnp.diff(ragged.query_starts)
    filled = ragged.lengths > 0
    decodes, prefills = filled & (counts == 1), filled & (counts > 1)
    rows, _, count = _items(decodes.astype(jnp.int32), problem.rows)
    attend_decodes = functools.partial(decode.attend, problem, rows, count)
    if problem.max_query_len == 1:
        out, lse, *written = attend_decodes(q, starts, pools, ragged, new)
        return *_masked(_of_tokens(problem, ragged, decodes), out, lse), Pools(*written) if written else pools
    if new is not None:
        pools = _write_chunks(problem, prefills, new, pools, ragged)
    block = prefill.query_block(problem)
    first, last = starts // block, (ragged.query_starts[1:] - 1) // block
    most = (problem.tokens + block - 1) // block + min(problem.rows, problem.tokens // 2)
    item_rows, nth, item_count = _items(jnp.where(prefills, last - first + 1, 0), most)
    blocks = first[item_rows] + nth
    results = prefill.attend(problem, item_rows, blocks, item_count, q, pools, ragged)
    out, lse = _masked(_of_tokens(problem, ragged, prefills), *results)
    own = jnp.arange(problem.rows, dtype=jnp.int32)
    new_rows = None if new is None else NewKV(*(x.at[starts].get(mode="clip") for x in new))
    out_rows, lse_rows, *written = attend_decodes(q.at[starts].get(mode="clip"), own, pools, ragged, new_rows)
    where = jnp.where(decodes, starts, problem.tokens)
    out, lse = out.at[where].set(out_rows, mode="drop"), lse.at[where].set(lse_rows, mode="drop")
    return out, lse, Pools(*written) if written else pools


def _write_chunks(problem: Problem, prefills: jax.Array, new: NewKV, pools: Pools, ragged: Ragged) -> Pools:
    """The pools with the KV of the rows that prefill."""
    counts, size = jnp.diff(ragged.query_starts), stream.page_tokens(problem)
    first, last = (ragged.lengths - counts) // size, (ragged.lengths - 1) // size
    rows, nth, count = _items(jnp.where(prefills, last - first + 1, 0), write.most_pages(problem))
    return write.write(problem, rows, first[rows] + nth, count, new, pools, ragged)


def _items(counts: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lays out `counts` `[rows]` items row after row: each one's row and number in it `[most]`; how many `[1]`.

    What follows the last item repeats it.
    """
    stops = jnp.cumsum(counts)
    item = jnp.minimum(jnp.arange(most, dtype=jnp.int32), jnp.maximum(stops[-1] - 1, 0))
    row = jnp.sum(stops[None, :] <= item[:, None], axis=1, dtype=jnp.int32)
    row = jnp.minimum(row, counts.shape[0] - 1)
    return row, item - (stops - counts)[row], stops[-1:]


def _of_tokens(problem: Problem, ragged: Ragged, rows: jax.Array) -> jax.Array:
    """Whether each token `[tokens]` is a query of one of `rows` (bool `[rows]`)."""
    token = jnp.arange(problem.tokens)[:, None]
    owned = (token >= ragged.query_starts[None, :-1]) & (token < ragged.query_starts[None, 1:])
    return jnp.any(owned & rows[None, :], axis=1)


def _masked(tokens: jax.Array, out: jax.Array, lse: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zeros and -inf for the tokens that a kernel did not write."""
    return jnp.where(tokens[:, None, None], out, 0), jnp.where(tokens[:, None], lse, -jnp.inf)
