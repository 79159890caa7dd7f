"""Sizes of the device tier: how many pages it has and what a page holds. Knows no JAX."""

import dataclasses

import ml_dtypes as ml_dtypes  # registers bfloat16 and the float8 types with NumPy
import numpy as np

from model.kernels.pool_shape import pool_shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Sizes of a paged KV pool. A *page* is the unit of device memory: `page_size` tokens of one sequence, all layers.

    Page `p` of layer `l` is row `l * num_pages + p` of the pools, so one page id names the same tokens in every layer
    and a sequence has one page table.

    Attributes:
        num_layers: layers with KV.
        num_pages: pages of the pool.
        page_size: tokens per page.
        num_kv_heads: KV heads of a layer, over all devices.
        head_dim: numbers per head.
        dtype: name of the dtype of the pool, such as "bfloat16".
        shards: devices that the KV heads are split over.
    """

    num_layers: int
    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "float32"
    shards: int = 1

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the K pool and of the V pool: `[num_layers * num_pages, num_kv_heads, page_size, head_dim]`.

        For heads of 64, two slots may share one row of 128 (`pool_shape`).
        """
        return pool_shape(self.num_layers * self.num_pages, self.num_kv_heads, self.page_size, self.head_dim)

    @property
    def fingerprint(self) -> str:
        """How the numbers of a page are arranged, whatever their dtype: equal where pages may be exchanged as bytes."""
        rows = "x".join(map(str, self.shape[1:]))
        return (
            f"layers={self.num_layers} kv_heads={self.num_kv_heads} head_dim={self.head_dim} "
            f"page_size={self.page_size} shards={self.shards} page=kv_head,slot,head_dim as {rows}"
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: K and V of `page_size` tokens in all layers."""
        numbers = 2 * self.num_layers * self.num_kv_heads * self.page_size * self.head_dim
        return numbers * np.dtype(self.dtype).itemsize

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)
