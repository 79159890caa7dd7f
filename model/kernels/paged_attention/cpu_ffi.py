"""Paged attention and the KV write on CPUs with AVX-512 or AVX2, by the C++ kernels of `cpu_kernels.cc`."""

import jax
import jax.numpy as jnp
import numpy as np

from model.kernels.paged_attention import cpu_library
from model.kernels.paged_attention.manual import result_type, vary_alike
from model.kernels.paged_attention.problem import Pools, Problem, Ragged

_Q_DTYPES = ("float32", "bfloat16", "float16")
_KV_DTYPES = (*_Q_DTYPES, "int8", "float8_e4m3fn", "float8_e5m2")
# Sizes of the buffers in cpu_kernels.cc.
_MAX_HEAD_DIM = 256
_MAX_GROUP = 96


def unsupported(problem: Problem) -> str | None:
    """Why this backend cannot take the case, or None."""
    if problem.q_dtype.name not in _Q_DTYPES:
        return f"q is {problem.q_dtype}; it must be one of {_Q_DTYPES}."
    if problem.kv_dtype.name not in _KV_DTYPES:
        return f"the pools are {problem.kv_dtype}; they must be one of {_KV_DTYPES}."
    if problem.head_dim % 16 or problem.head_dim > _MAX_HEAD_DIM:
        return f"head_dim is {problem.head_dim}; it must be a multiple of 16 up to {_MAX_HEAD_DIM}."
    if problem.page_size % 16:
        return f"page_size is {problem.page_size}; it must be a multiple of 16."
    if problem.group > _MAX_GROUP:
        return f"{problem.group} query heads share a KV head; at most {_MAX_GROUP} may."
    return cpu_library.unavailable()


def attend(problem: Problem, q: jax.Array, pools: Pools, ragged: Ragged) -> tuple[jax.Array, jax.Array]:
    """Returns (out `[tokens, q_heads, head_dim]` in q's dtype, lse float32 `[tokens, q_heads]`)."""
    unscaled = jnp.zeros((0,), jnp.float32)
    scales = [unscaled if scale is None else scale for scale in (pools.k_scale, pools.v_scale)]
    operands = vary_alike(q, pools.k, pools.v, *scales, *ragged)
    out = result_type(q.shape, q.dtype, like=operands[0])
    lse = result_type(q.shape[:2], jnp.float32, like=operands[0])
    out, lse = jax.ffi.ffi_call("halfmoon_paged_attention", (out, lse))(
        *operands,
        scale=np.float32(problem.scale),
        soft_cap=np.float32(problem.soft_cap or 0.0),
        window=np.int32(problem.sliding_window or 0),
    )
    return out, lse


def write_kv(
    pool_k: jax.Array, pool_v: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes `k`, `v` `[tokens, kv_heads, head_dim]` of the pools' dtype at `slots`; in place if donated."""
    operands = vary_alike(pool_k, pool_v, k, v, slots)
    results = tuple(result_type(pool.shape, pool.dtype, like=pool) for pool in operands[:2])
    call = jax.ffi.ffi_call("halfmoon_write_kv", results, input_output_aliases={0: 0, 1: 1})
    written_k, written_v = call(*operands)
    return written_k, written_v
