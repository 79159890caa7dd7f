"""Pages, block keys, prefix index and eviction: the KV cache, which knows no request (floor 2)."""
