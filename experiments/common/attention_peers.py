"""Attention of others over the same paged KV, for `bench_paged_attention`: they are installed, or left out."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_WORKSPACE_BYTES = 128 << 20
# Of query heads to a KV head, from which FlashInfer's decode is the faster one by matrix units.
_TENSOR_CORE_GROUP = 4


def _torch_sdpa(batch: Any, query_len: int) -> Callable[[], Any]:
    """Torch's fused attention, which knows no pages: they are gathered first, in every call."""
    import torch
    from torch.nn.attention.bias import causal_lower_right

    q, k, v, table = (torch.from_dlpack(x) for x in (batch.q, *batch.cache[:2], batch.page_table))
    rows, context, (kv_heads, _, head_dim) = table.shape[0], int(batch.lengths[0]), k.shape[1:]
    q, table = q.view(rows, query_len, -1, head_dim).transpose(1, 2), table.long()
    mask = None if query_len == 1 else causal_lower_right(query_len, context)

    def gathered(pool: Any) -> Any:
        return pool[table].transpose(1, 2).reshape(rows, kv_heads, -1, head_dim)[:, :, :context]

    def attend() -> Any:
        out = torch.nn.functional.scaled_dot_product_attention(
            q, gathered(k), gathered(v), attn_mask=mask, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(batch.q.shape)

    return attend


def _flashinfer(batch: Any, query_len: int) -> Callable[[], Any]:
    """FlashInfer's kernels for paged KV, planned once: by FA3 for prefill on Hopper, by FA2 else."""
    if jax.default_backend() != "gpu":
        raise NotImplementedError(f"FlashInfer is for GPUs; these devices are {jax.default_backend()}.")
    if batch.q.dtype.itemsize != 2:
        raise NotImplementedError(f"FlashInfer is for queries of two bytes a value; these are {batch.q.dtype}.")
    import flashinfer
    import torch

    q, k, v, table = (torch.from_dlpack(x) for x in (batch.q, *batch.cache[:2], batch.page_table))
    (rows, pages), (kv_heads, page_size, head_dim) = table.shape, k.shape[1:]
    ends = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    last = torch.full_like(ends[1:], (int(batch.lengths[0]) - 1) % page_size + 1)
    pages_of = (ends * pages, table.reshape(-1), last)
    sizes = (q.shape[1], kv_heads, head_dim, page_size)
    dtypes = {"q_data_type": q.dtype, "kv_data_type": k.dtype}
    workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
    if query_len == 1:
        grouped = q.shape[1] >= _TENSOR_CORE_GROUP * kv_heads
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=grouped)
        wrapper.plan(*pages_of, *sizes, **dtypes)
    else:
        wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        wrapper.plan(ends * query_len, *pages_of, *sizes, causal=True, **dtypes)
    return lambda: wrapper.run(q, (k, v))


TORCH_PEERS = {"torch_sdpa": _torch_sdpa, "flashinfer": _flashinfer}
"""By name, what prepares an attention over torch's view of a batch: `(batch, query_len) -> (() -> out)`."""


def prepared(name: str, batch: Any, query_len: int) -> Callable[[int], jax.Array]:
    """The attention of a batch by a peer, so many times in a row; returns when all are done.

    On a GPU the calls are one CUDA graph, as ours are one program: a host that launches them one by one is slower.

    Raises:
      ImportError: the peer is not installed.
      NotImplementedError: the peer does not take this batch.
    """
    if batch.cache.k_scale is not None:
        raise NotImplementedError(f"{name} is measured on KV in the dtype of q.")
    once = TORCH_PEERS[name](batch, query_len)
    if jax.default_backend() != "gpu":
        return lambda calls: jnp.from_dlpack([once() for _ in range(calls)][-1].contiguous())
    import torch

    @functools.cache
    def recorded(calls: int) -> tuple[Any, Any]:
        out = once()  # what only a first call does is no part of the graph
        graph = torch.cuda.CUDAGraph()
        # JAX's own threads may call CUDA meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(calls):
                out = once()  # one at a time: what a graph has allocated, it keeps
            out = out.contiguous()
        return graph, out

    def attend(calls: int) -> jax.Array:
        graph, out = recorded(calls)
        graph.replay()
        torch.cuda.synchronize()
        return jnp.from_dlpack(out)

    return attend
