"""One step of a model over the paged KV cache, as a pure function."""

import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache
from model.config import ModelConfig
from model.kernels.paged_attention import write_and_attend
from model.sharding import shard_attend
from model.transformer import Attend, Definition, merge
from serving.engine.batch import StepInputs
from serving.engine.buckets import Bucket


def paged_attend(
    config: ModelConfig, layout: KVLayout, inputs: StepInputs, bucket: Bucket, implementation: str | None
) -> Attend:
    """Returns the attention of one step: writes the step's KV into the cache, then attends decode rows and chunks."""
    decode = bucket.decode_rows

    def attend(layer: int, q: Array, k: Array, v: Array, cache: PagedKVCache) -> tuple[Array, PagedKVCache]:
        first_page = layer * layout.num_pages
        slots = jnp.where(inputs.slots < 0, -1, inputs.slots + first_page * layout.page_size)
        starts = jnp.concatenate([jnp.arange(decode, dtype=jnp.int32), decode + inputs.prefill_starts])
        # One call for all rows: a second one that writes what the first has read would copy the pool on some backends.
        out, pool_k, pool_v = write_and_attend(
            q,
            k,
            v,
            slots,
            cache,
            inputs.page_table + first_page,
            inputs.lengths,
            starts,
            max_query_len=bucket.prefill_tokens if bucket.prefill_rows else 1,
            sliding_window=config.window(layer),
            implementation=implementation,
        )
        return out, PagedKVCache(pool_k, pool_v, layout)

    return attend


def compute_step(
    definition: Definition,
    config: ModelConfig,
    mesh: Mesh | None,
    bucket: Bucket,
    implementation: str | None,
    weights: tuple[Array, ...],
    cache: PagedKVCache,
    inputs: StepInputs,
) -> tuple[Array, PagedKVCache]:
    """Computes one step; pure, to be jitted with `definition` to `implementation` static and `cache` donated.

    Args:
        definition: the model without its weights.
        config: the model's shape.
        mesh: what weights and cache are laid out over; `None` on one device.
        bucket: the step's shape.
        implementation: paged-attention backend; `None` lets the dispatcher choose.
        weights: the flat weights of `model.transformer.split`.
        cache: KV of everything before this step.
        inputs: this step's tokens, padded to `bucket`.

    Returns:
        Logits float32 [R, V] of each row's last token, and the cache with this step's KV.
    """
    model = merge(definition, weights)
    attend = shard_attend(paged_attend(config, cache.layout, inputs, bucket, implementation), mesh)
    hidden_TxD, cache = model(inputs.tokens, inputs.positions, attend, cache)
    return model.logits(hidden_TxD[inputs.last]), cache
