"""Shapes to keep paged KV pools in, for all backends alike. Knows no JAX."""


def pool_shape(pages: int, kv_heads: int, page_size: int, head_dim: int) -> tuple[int, int, int, int]:
    """The shape to keep K and V pools of unscaled values in, so that no backend copies or pads them.

    The same numbers in the same order as `[pages, kv_heads, page_size, head_dim]`. TPUs pad the last axis to 128, which
    for heads of 64 doubles the bytes; there two tokens share a row.
    """
    if head_dim == 64 and page_size % 32 == 0:
        return (pages, kv_heads, page_size // 2, 2 * head_dim)
    return (pages, kv_heads, page_size, head_dim)


def scales_shape(pages: int, kv_heads: int, page_size: int) -> tuple[int, int, int]:
    """The shape to keep the scales of a pool in, so that no backend copies them.

    The same numbers in the same order as `[pages, kv_heads, page_size]`, with 128 in the last axis where they fill it:
    TPUs pad it to that, which for pages of 64 doubles the bytes. Axis 1 is still what a mesh splits heads over.
    """
    if kv_heads * page_size % 128:
        return (pages, kv_heads, page_size)
    return (pages, kv_heads * page_size // 128, 128)
