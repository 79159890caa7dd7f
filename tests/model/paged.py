"""A paged cache of one sequence, as little as the model needs to decode through the paged kernels."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from model.config import ModelConfig
from model.kernels.paged_attention import paged_attention, write_kv
from model.sharding import shard_attend
from model.transformer import Attend, merge

PAGE_SIZE = 4


class Pools(NamedTuple):
    """K and V of all layers, [layers * pages, kv_heads, page_size, head_dim]."""

    k: jax.Array
    v: jax.Array


def empty_pools(config: ModelConfig, tokens: int) -> Pools:
    pages = config.num_layers * -(-tokens // PAGE_SIZE)
    shape = (pages, config.num_kv_heads, PAGE_SIZE, config.head_dim)
    return Pools(jnp.zeros(shape), jnp.zeros(shape))


def paged_attend(config: ModelConfig, positions: jax.Array, max_query_len: int) -> Attend:
    """Attends from tokens at consecutive `positions`, writing their K and V first."""

    def attend(layer, q, k, v, kv):
        pages = kv.k.shape[0] // config.num_layers
        # Pages in reverse, so that a wrong table shows.
        table = (layer + 1) * pages - 1 - jnp.arange(pages, dtype=jnp.int32)
        slots = table[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
        kv = Pools(*write_kv(kv.k, kv.v, k, v, slots))
        out = paged_attention(
            q,
            kv,
            table[None],
            positions[-1:] + 1,
            jnp.array([0, len(positions)], jnp.int32),
            max_query_len=max_query_len,
            sliding_window=config.window(layer),
        )
        return out, kv

    return attend


@functools.partial(jax.jit, static_argnums=(0, 5))
def paged_step(definition, weights, tokens, positions, kv, mesh=None):
    """Logits [tokens, vocab] of the next tokens of one sequence, and the cache with them in it."""
    model = merge(definition, weights)
    attend = shard_attend(paged_attend(model.config, positions, len(tokens)), mesh)
    hidden, kv = model(tokens, positions, attend, kv)
    return model.logits(hidden), kv
