"""Paged attention in plain XLA: correct on every platform, and the fast portable form on CPU.

Softmax runs online over chunks of `_CHUNK` keys, gathered page by page, so time grows with the keys that are really
attended: loops stop at each row's own length (and start at its window), whatever the width of the page table or the
size of the pool. On CPU rows are taken one after the other, which keeps a chunk in cache; on accelerators the decode
rows run together, as a batched loop to the longest row, and only longer rows are taken in turn.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from model.kernels.paged_attention.problem import Pools, Problem, Ragged, plain

_CHUNK = 256
_QUERY_BLOCK = 128


def unsupported(problem: Problem) -> str | None:
    """This backend takes everything."""
    del problem


def attend(problem: Problem, q: jax.Array, pools: Pools, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
    """Returns (out `[tokens, q_heads, head_dim]` in q's dtype, lse float32 `[tokens, q_heads]`)."""
    return lax.platform_dependent(
        q,
        plain(problem, pools),
        ragged,
        cpu=functools.partial(_one_row_at_a_time, problem, jnp.float32),
        default=functools.partial(_decode_rows_together, problem),
    )


def _one_row_at_a_time(problem: Problem, dtype, q: jax.Array, pools: Pools, ragged: Ragged, fewest: int = 1):
    """Attends rows that have at least `fewest` queries; the tokens of other rows come out as zeros."""
    block = min(problem.max_query_len, _QUERY_BLOCK)
    q_padded = jnp.pad(q, ((0, block), (0, 0), (0, 0)))
    table = _padded_table(problem, ragged.page_table)

    def attend_block(r, size, b, state):
        first, count = ragged.query_starts[r], ragged.query_starts[r + 1] - ragged.query_starts[r]
        start = first + b * size
        index = b * size + jnp.arange(size)
        positions = jnp.where(index < count, ragged.lengths[r] - count + index, -1)
        q_block = lax.dynamic_slice_in_dim(q_padded, start, size)
        results = _attend_block(problem, dtype, pools, table[r], q_block, positions)
        # A last block reaches past its row, onto tokens of later rows: those are written later.
        return tuple(
            lax.dynamic_update_slice_in_dim(whole, part, start, 0) for whole, part in zip(state, results, strict=True)
        )

    def attend_row(r, state):
        count = ragged.query_starts[r + 1] - ragged.query_starts[r]
        if fewest == 1:
            state = lax.fori_loop(0, jnp.where(count == 1, 1, 0), functools.partial(attend_block, r, 1), state)
        if block > 1:
            blocks = jnp.where(count > 1, (count + block - 1) // block, 0)
            state = lax.fori_loop(0, blocks, functools.partial(attend_block, r, block), state)
        return state

    out = jnp.zeros_like(q_padded)
    lse = jnp.full_like(q_padded[:, :, 0], -jnp.inf, jnp.float32)
    out, lse = lax.fori_loop(0, problem.rows, attend_row, (out, lse))
    return out[: problem.tokens], lse[: problem.tokens]


def _decode_rows_together(problem: Problem, q: jax.Array, pools: Pools, ragged: Ragged):
    """Attends all rows of one query at once, and the others one after the other."""
    dtype = q.dtype if problem.quantized or q.dtype == pools.k.dtype else jnp.float32
    starts, counts = ragged.query_starts[:-1], jnp.diff(ragged.query_starts)
    positions = jnp.where(counts == 1, ragged.lengths - 1, -1)
    attend_row = functools.partial(_attend_block, problem, dtype, pools)
    table = _padded_table(problem, ragged.page_table)
    q_rows = q.at[starts].get(mode="clip")
    out_rows, lse_rows = jax.vmap(attend_row)(table, q_rows[:, None], positions[:, None])
    if problem.max_query_len > 1:
        out, lse = _one_row_at_a_time(problem, dtype, q, pools, ragged, fewest=2)
    else:
        out, lse = jnp.zeros_like(q), jnp.full(q.shape[:2], -jnp.inf)
    where = jnp.where(counts == 1, starts, problem.tokens)
    return (
        out.at[where].set(out_rows[:, 0], mode="drop"),
        lse.at[where].set(lse_rows[:, 0], mode="drop"),
    )


def _padded_table(problem: Problem, page_table: jax.Array) -> jax.Array:
    """The page table with room for a whole chunk after its last page."""
    return jnp.pad(page_table, ((0, 0), (0, _pages_per_chunk(problem))))


def _pages_per_chunk(problem: Problem) -> int:
    return max(1, _CHUNK // problem.page_size)


def _attend_block(problem: Problem, dtype, pools: Pools, table: jax.Array, q: jax.Array, positions: jax.Array):
    """Some queries of one row: q `[size, q_heads, head_dim]` at `positions` `[size]`, -1 where there is no query."""
    size = q.shape[0]
    heads, group, head_dim = problem.kv_heads, problem.group, problem.head_dim
    q_KxMxD = q.reshape(size, heads, group, head_dim).transpose(1, 0, 2, 3).reshape(heads, size * group, head_dim)
    q_KxMxD = q_KxMxD.astype(dtype)
    position_M = jnp.repeat(positions, group)
    chunk_tokens = _pages_per_chunk(problem) * problem.page_size
    stop = jnp.max(positions) + 1
    begin = 0
    if problem.sliding_window is not None:
        earliest = jnp.min(jnp.where(positions < 0, stop, positions))
        begin = jnp.maximum(earliest - problem.sliding_window + 1, 0) // chunk_tokens

    def attend_chunk(c, state):
        peak, total, weighted = state
        k_KxSxD, k_scale = _chunk(problem, pools.k, pools.k_scale, table, c, dtype)
        v_KxSxD, v_scale = _chunk(problem, pools.v, pools.v_scale, table, c, dtype)
        key_S = c * chunk_tokens + jnp.arange(chunk_tokens)
        seen_MxS = key_S[None, :] <= position_M[:, None]
        if problem.sliding_window is not None:
            seen_MxS &= key_S[None, :] > position_M[:, None] - problem.sliding_window
        scores = _batched_dot(q_KxMxD, k_KxSxD, 2) * problem.scale
        if k_scale is not None:
            scores = scores * k_scale[:, None, :]
        if problem.soft_cap is not None:
            scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)
        scores = jnp.where(seen_MxS[None], scores, _LOWEST)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
        weights = jnp.where(seen_MxS[None], jnp.exp(scores - new_peak[..., None]), 0.0)
        decay = jnp.exp(peak - new_peak)
        new_total = total * decay + jnp.sum(weights, axis=-1)
        if v_scale is not None:
            # A slot that was never written may hold NaN, and 0 * NaN is NaN.
            weights = jnp.where(weights > 0, weights * v_scale[:, None, :], 0.0)
        values = jnp.where(key_S[None, :, None] < stop, v_KxSxD, 0)
        new_weighted = weighted * decay[..., None] + _batched_dot(weights.astype(dtype), values, 1)
        return new_peak, new_total, new_weighted

    weighted = jnp.zeros_like(q_KxMxD, jnp.float32)
    total = weighted[..., 0]
    chunks = (stop + chunk_tokens - 1) // chunk_tokens
    peak, total, weighted = lax.fori_loop(begin, chunks, attend_chunk, (total + _LOWEST, total, weighted))
    out_KxMxD = weighted / jnp.where(total > 0, total, 1.0)[..., None]
    lse_KxM = jnp.where(total > 0, peak + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    out = out_KxMxD.reshape(heads, size, group, head_dim).transpose(1, 0, 2, 3).reshape(q.shape).astype(q.dtype)
    return out, lse_KxM.reshape(heads, size, group).transpose(1, 0, 2).reshape(q.shape[:2])


# Below any score, yet finite: differences of two of them are 0, not NaN.
_LOWEST = -1e30


def _chunk(problem: Problem, pool: jax.Array, scale: jax.Array | None, table: jax.Array, c, dtype):
    """Keys or values of chunk `c` of one row: `[kv_heads, chunk, head_dim]`, and its scales `[kv_heads, chunk]`."""
    pages = lax.dynamic_slice_in_dim(table, c * _pages_per_chunk(problem), _pages_per_chunk(problem))
    heads = jnp.arange(problem.kv_heads)
    # One index per page and head into a flat pool: XLA:CPU copies whole pages for it, head-major.
    index = pages[None, :] * problem.kv_heads + heads[:, None]
    flat = pool.reshape(-1, problem.page_size, problem.head_dim)
    taken = flat.at[index].get(mode="clip").reshape(problem.kv_heads, -1, problem.head_dim).astype(dtype)
    if scale is None:
        return taken, None
    scales = scale.reshape(-1, problem.page_size).at[index].get(mode="clip")
    return taken, scales.reshape(problem.kv_heads, -1)


def _batched_dot(a: jax.Array, b: jax.Array, contract: int) -> jax.Array:
    """`a` `[K, M, X]` with `b` contracted over its axis `contract`, per K, in float32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((2,), (contract,)), ((0,), (0,)))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
