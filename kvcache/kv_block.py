"""The KV of some pages, outside of the pool that it was computed in."""

import dataclasses

import jax
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVBlock:
    """KV of `num_pages` pages in `layers`, as a pytree; on a device or in host memory.

    Page-major, so that the first n pages, or the pages of one of several blocks, are one run of bytes in each array.

    Attributes:
        k, v: `[pages, layers, *page]` of the pool's dtype, where `page` is a page as the pool keeps it:
            `[kv_heads, page_size, head_dim]`, or with two slots in a row for heads of 64. On a device `pages` is a
            power of two; whatever follows the first `num_pages` means nothing.
        num_pages: pages of the block.
        layers: layers of the model that the block holds.
    """

    k: jax.Array | np.ndarray
    v: jax.Array | np.ndarray
    num_pages: int = dataclasses.field(metadata={"static": True})
    layers: range = dataclasses.field(metadata={"static": True})

    @property
    def nbytes(self) -> int:
        """Bytes of the block's pages, without what follows them."""
        return (self.k.nbytes + self.v.nbytes) * self.num_pages // self.k.shape[0]

    def is_ready(self) -> bool:
        """Whether the block is computed, so that `to_host` does not wait for the device."""
        return all(x.is_ready() for x in (self.k, self.v) if isinstance(x, jax.Array))  # pyrefly: ignore

    def to_host(self) -> "KVBlock":
        """Returns the block in host memory, without padding: NumPy arrays, which on CPU share the device's memory."""
        k, v = (np.asarray(x)[: self.num_pages] for x in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v)
