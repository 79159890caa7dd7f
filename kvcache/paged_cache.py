"""The device tier: a paged KV pool that lives in one donated pytree."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding

from kvcache.layout import KVLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """K and V pools of one layout. Donate it to every jit that returns a new one, so that no pool is ever copied.

    Attributes:
        k, v: `layout.shape` of `layout.dtype`.
        layout: sizes of both pools.
    """

    k: Array
    v: Array
    layout: KVLayout = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(cls, layout: KVLayout, sharding: Sharding | None = None) -> "PagedKVCache":
        """Returns a zeroed cache; `sharding` splits dimension 1 (KV heads) over a mesh."""
        k, v = (jnp.zeros(layout.shape, layout.dtype, device=sharding) for _ in range(2))
        return cls(k, v, layout)
