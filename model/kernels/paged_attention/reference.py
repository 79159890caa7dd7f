"""Paged attention in float32, written to be read: every token's keys gathered, one softmax. For tests only."""

import jax
import jax.numpy as jnp

from model.kernels.paged_attention.problem import Pools, Problem, Ragged, plain


def unsupported(problem: Problem) -> str | None:
    """This backend takes everything."""
    del problem


def attend(problem: Problem, q: jax.Array, pools: Pools, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
    """Returns (out `[tokens, q_heads, head_dim]` in q's dtype, lse float32 `[tokens, q_heads]`)."""
    pools = plain(problem, pools)
    token = jnp.arange(problem.tokens)
    row = jnp.searchsorted(ragged.query_starts, token, side="right") - 1
    owned = (row >= 0) & (row < problem.rows)
    row = jnp.clip(row, 0, problem.rows - 1)
    position = ragged.lengths[row] - ragged.query_starts[row + 1] + token

    pages_TxP = jnp.clip(ragged.page_table[row], 0, problem.pages - 1)
    k_TxSxKxD = _tokens_of(pools.k, pools.k_scale, pages_TxP)
    v_TxSxKxD = _tokens_of(pools.v, pools.v_scale, pages_TxP)
    key = jnp.arange(k_TxSxKxD.shape[1])
    seen_TxS = owned[:, None] & (key[None, :] <= position[:, None])
    if problem.sliding_window is not None:
        seen_TxS &= key[None, :] > position[:, None] - problem.sliding_window

    q_TxKxGxD = q.astype(jnp.float32).reshape(problem.tokens, problem.kv_heads, problem.group, problem.head_dim)
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("tkgd,tskd->tkgs", q_TxKxGxD, k_TxSxKxD, precision=exact) * problem.scale
    if problem.soft_cap is not None:
        scores = problem.soft_cap * jnp.tanh(scores / problem.soft_cap)
    scores = jnp.where(seen_TxS[:, None, None, :], scores, -jnp.inf)
    lse_TxKxG = jax.nn.logsumexp(scores, axis=-1)
    probabilities = jnp.where(
        seen_TxS[:, None, None, :], jnp.exp(scores - jnp.nan_to_num(lse_TxKxG, neginf=0.0)[..., None]), 0.0
    )
    values = jnp.where(seen_TxS[:, :, None, None], v_TxSxKxD, 0.0)
    out = jnp.einsum("tkgs,tskd->tkgd", probabilities, values, precision=exact)
    return out.reshape(q.shape).astype(q.dtype), lse_TxKxG.reshape(q.shape[:2])


def _tokens_of(pool: jax.Array, scale: jax.Array | None, pages_TxP: jax.Array) -> jax.Array:
    """The keys or values of some pages in float32, token after token: `[T, P * page_size, kv_heads, head_dim]`."""
    taken = pool[pages_TxP].astype(jnp.float32)
    if scale is not None:
        taken = taken * scale[pages_TxP][..., None]
    tokens, pages, kv_heads, page_size, head_dim = taken.shape
    return taken.swapaxes(2, 3).reshape(tokens, pages * page_size, kv_heads, head_dim)
