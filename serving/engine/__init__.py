"""Continuous batching over a paged KV cache on one mesh (floor 3)."""
