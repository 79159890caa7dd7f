"""Shapes of a serving step on one TPU chip, and how to lower it without one."""

import dataclasses

import jax
import jax.numpy as jnp

from model.kernels.paged_attention import paged_attention, pool_shape, scales_shape, write_and_attend
from tests.model.kernels.paged_attention import cases


@dataclasses.dataclass(frozen=True)
class Step:
    """One layer's attention: `rows` rows of up to `context` KV tokens, `tokens` queries among them."""

    rows: int = 32
    tokens: int = 32
    max_query_len: int = 1
    context: int = 4096
    q_heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    page_size: int = 64
    kv_dtype: str = "bfloat16"
    sliding_window: int | None = None

    @property
    def page_bytes(self) -> int:
        """Of keys and values of one page, with their scales."""
        itemsize = jnp.dtype(self.kv_dtype).itemsize
        return 2 * self.kv_heads * self.page_size * (self.head_dim * itemsize + (4 if itemsize == 1 else 0))

    @property
    def kv_bytes(self) -> int:
        """That one query of each row must read, all rows at their longest."""
        tokens = min(self.context, self.sliding_window or self.context)
        return self.rows * tokens * self.page_bytes // self.page_size

    @property
    def q_bytes(self) -> int:
        """Of the queries; as much as of the results."""
        return self.tokens * self.q_heads * self.head_dim * 2

    @property
    def spread_bytes(self) -> int:
        """Of the queries beside those that a kernel takes: four times as many bytes where two tokens share a row."""
        return self.q_bytes * (5 if self.head_dim == 64 else 1)

    @property
    def lse_bytes(self) -> int:
        """Of the results' log-sum-exps in float32, heads in whole tiles of 128 lanes."""
        return self.tokens * -(-self.q_heads // 128) * 128 * 4

    def batch(self, sharding=None) -> cases.Batch:
        """The shapes of the arguments."""

        def array(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        max_pages = self.context // self.page_size
        pages = self.rows * max_pages
        shape = (pages, self.kv_heads, self.page_size, self.head_dim)
        one_byte = jnp.dtype(self.kv_dtype).itemsize == 1
        pool = array(shape if one_byte else pool_shape(*shape), self.kv_dtype)
        cache: cases.Cache | cases.QuantizedCache = cases.Cache(pool, pool)
        if one_byte:
            scale = array(scales_shape(*shape[:3]), jnp.float32)
            cache = cases.QuantizedCache(pool, pool, scale, scale)
        return cases.Batch(
            q=array((self.tokens, self.q_heads, self.head_dim), jnp.bfloat16),
            cache=cache,
            page_table=array((self.rows, max_pages), jnp.int32),
            lengths=array((self.rows,), jnp.int32),
            query_starts=array((self.rows + 1,), jnp.int32),
        )

    def attend(self, batch: cases.Batch) -> jax.Array:
        """By whichever backend the dispatcher takes."""
        return paged_attention(*batch, max_query_len=self.max_query_len, sliding_window=self.sliding_window)


DECODES = {
    "bf16": Step(),
    "int8": Step(kv_dtype="int8"),
    "int8, page 128": Step(kv_dtype="int8", page_size=128),
    "int8, page 32": Step(kv_dtype="int8", page_size=32),
    "fp8": Step(kv_dtype="float8_e4m3fn"),
    "window": Step(sliding_window=1024),
    "MQA": Step(kv_heads=1, page_size=16),
    "head_dim 64": Step(head_dim=64),
    "head_dim 256": Step(rows=8, tokens=8, q_heads=8, head_dim=256),
}
CHUNKS = {
    "bf16": Step(rows=8, tokens=512, max_query_len=505),
    "int8": Step(rows=8, tokens=64, max_query_len=57, kv_dtype="int8"),
    "head_dim 64": Step(rows=8, tokens=64, max_query_len=57, head_dim=64),
    "MHA, head_dim 256": Step(rows=8, tokens=64, max_query_len=57, q_heads=8, head_dim=256),
}


V6E, V5P = (jax.sharding.AbstractDevice(kind, cores, "tpu") for kind, cores in (("TPU v6 lite", 1), ("TPU v5", 2)))


def lowered_for(device: jax.sharding.AbstractDevice, step: Step) -> str:
    """What the step's attention lowers to on such a device, of which there need be none."""
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(step.attend).trace(step.batch()).lower(lowering_platforms=("tpu",)).as_text()


def write_and_attend_in_every_layer(step: Step, layers: int, cache, q, k, v, slots, page_table, lengths, query_starts):
    """A loop over layers whose pools are one carried array, as a transformer has it; the cache holds all layers."""
    pages = cache.k.shape[0] // layers

    def layer(carry, index):
        q, cache = carry
        there = jnp.where(slots < 0, slots, slots + index * pages * step.page_size)
        ragged = (page_table + index * pages, lengths, query_starts)
        out, *pools = write_and_attend(q, k, v, there, cache, *ragged, max_query_len=step.max_query_len)
        return (out, cases.Cache(*pools)), None

    return jax.lax.scan(layer, (q, cache), jnp.arange(layers))[0]
