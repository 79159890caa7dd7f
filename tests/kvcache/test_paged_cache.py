"""The pool on the device is exactly as large as its layout says."""

import pytest

from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache


@pytest.mark.parametrize(("head_dim", "page_size"), [(8, 16), (64, 64)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layout_accounts_its_bytes(head_dim: int, page_size: int, dtype: str) -> None:
    layout = KVLayout(num_layers=3, num_pages=5, page_size=page_size, num_kv_heads=2, head_dim=head_dim, dtype=dtype)
    cache = PagedKVCache.create(layout)
    assert cache.k.nbytes + cache.v.nbytes == layout.page_bytes * layout.num_pages
    assert [layout.pages_for(tokens) for tokens in (0, 1, page_size, page_size + 1)] == [0, 1, 1, 2]
