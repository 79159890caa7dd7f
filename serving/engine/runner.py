"""The device side of an engine: weights, the KV pool and the jitted step over them."""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache
from model.config import ModelConfig
from model.sharding import KV_SPEC, shard_model
from model.transformer import Definition, Transformer, split
from serving.engine.batch import StepInputs
from serving.engine.buckets import Bucket
from serving.engine.errors import EngineError
from serving.engine.step import compute_step
from serving.engine.types import EngineConfig

_DEFAULT_KV_BYTES = 1 << 30
_FREE_MEMORY_SHARE = 0.9


@functools.lru_cache(maxsize=16)
def _step(definition: Definition, config: ModelConfig, mesh: Mesh | None) -> jax.stages.Wrapped:
    """The jitted step, one for all engines of the same model: what one has compiled, the others have too."""
    return jax.jit(
        functools.partial(compute_step, definition, config, mesh), static_argnums=(0, 1), donate_argnums=(3,)
    )


class ModelRunner:
    """Owns the weights and the KV pool. `forward` is the only thing that touches them."""

    def __init__(self, config: ModelConfig, model: Transformer, engine: EngineConfig, mesh: Mesh | None = None):
        definition, self._weights = split(shard_model(model, mesh) if mesh else model)
        dtype = engine.kv_dtype or self._weights[0].dtype
        # Always placed explicitly: a step returns a placed pool, and the first bucket would compile once more for it.
        sharding = NamedSharding(mesh, KV_SPEC) if mesh else self._weights[0].sharding
        self.layout = kv_layout(config, engine, dtype)
        self._cache = PagedKVCache.create(self.layout, sharding)
        self._step = _step(definition, config, mesh)
        self._implementation = engine.attention

    def forward(self, inputs: StepInputs, bucket: Bucket) -> Array:
        """Runs one step and returns logits float32 [R, V]; the pool is updated in place (its buffers are donated)."""
        logits, self._cache = self._step(bucket, self._implementation, self._weights, self._cache, inputs)
        return logits

    def lower(self, inputs: StepInputs, bucket: Bucket) -> jax.stages.Lowered:
        """The traced step of that shape; what it compiles to is what `forward` runs."""
        return self._step.lower(bucket, self._implementation, self._weights, self._cache, inputs)

    def step_temp_bytes(self, inputs: StepInputs, bucket: Bucket) -> int:
        """Scratch memory of the compiled step; far below the pool's size, because the pool is never copied."""
        analysis = self.lower(inputs, bucket).compile().memory_analysis()
        if analysis is None:
            raise EngineError(f"backend {jax.default_backend()!r} does not report what a compiled step allocates.")
        return analysis.temp_size_in_bytes


def kv_layout(config: ModelConfig, engine: EngineConfig, dtype: jnp.dtype | str) -> KVLayout:
    """Sizes the pool: `num_pages` if given, else what fits `kv_bytes`, else what fits the device's free memory."""

    def layout(num_pages: int) -> KVLayout:
        return KVLayout(
            num_layers=config.num_layers,
            num_pages=num_pages,
            page_size=engine.page_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=jnp.dtype(dtype).name,
        )

    if engine.num_pages is not None:
        return layout(engine.num_pages)
    kv_bytes = engine.kv_bytes if engine.kv_bytes is not None else _free_bytes()
    num_pages = kv_bytes // layout(1).page_bytes
    if num_pages < 1:
        raise EngineError(
            f"{kv_bytes} bytes of KV memory hold no page: one page of {engine.page_size} tokens takes "
            f"{layout(1).page_bytes} bytes. Raise `kv_bytes` or lower `page_size`."
        )
    return layout(num_pages)


def _free_bytes() -> int:
    """Free memory of the devices once the weights are loaded; a fixed figure where the backend reports none."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):
        return _DEFAULT_KV_BYTES
    return int(_FREE_MEMORY_SHARE * sum(s["bytes_limit"] - s["bytes_in_use"] for s in stats))
