"""The device tier: a paged KV pool that lives in one donated pytree."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding

from kvcache.layout import KVLayout
from model.kernels.paged_attention import pool_shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """K and V pools of one layout. Donate it to every jit that returns a new one, so that no pool is ever copied.

    Attributes:
        k, v: `[num_layers * num_pages, num_kv_heads, page_size, head_dim]` of `layout.dtype`; for heads of 64 two slots
            may share one row of 128 (`paged_attention.pool_shape`).
        layout: sizes of both pools.
    """

    k: Array
    v: Array
    layout: KVLayout = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, layout: KVLayout, sharding: Sharding | None = None) -> "PagedKVCache":
        """Returns a zeroed cache; `sharding` splits dimension 1 (KV heads) over a mesh."""
        rows = layout.num_layers * layout.num_pages
        shape = pool_shape(rows, layout.num_kv_heads, layout.page_size, layout.head_dim)
        k, v = (jnp.zeros(shape, layout.dtype, device=sharding) for _ in range(2))
        return cls(k, v, layout)
