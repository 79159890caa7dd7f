"""What computes an engine's steps: the protocol, and the runner of a whole model on one mesh."""

import functools
import threading
from collections.abc import Sequence
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, NamedSharding

from kvcache import moves
from kvcache.kv_block import KVBlock
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
    """Returns the jitted step, one for all runners of the same model: what one has compiled, the others have too."""
    return jax.jit(
        functools.partial(compute_step, definition, config, mesh), static_argnums=(0, 1), donate_argnums=(3,)
    )


class StepRunner(Protocol):
    """Computes steps over a KV pool that it owns. Called by the engine's thread only, except `compile`."""

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        ...

    @property
    def layout(self) -> KVLayout:
        """Sizes of the pool."""
        ...

    def compile(self, inputs: StepInputs, bucket: Bucket) -> None:
        """Compiles the step of that shape, so that `forward` does not; several threads may compile at once."""
        ...

    def forward(self, inputs: StepInputs, bucket: Bucket) -> Array:
        """Dispatches one step: its KV goes into the pool. Returns logits float32 [R, V] of each row's last token."""
        ...

    def extract(self, pages: Sequence[int], layers: range) -> KVBlock:
        """Starts to copy the KV of `pages` in `layers` off the device; later steps do not change it."""
        ...

    def insert(self, pages: Sequence[int], block: KVBlock) -> Array:
        """Dispatches the write of `block` into `pages`, and returns `done`.

        Host memory of `block` must stay as it is until `done.is_ready()` (`kvcache.moves.insert` says why).
        """
        ...


class ModelRunner:
    """Runs a whole model on one mesh: owns the weights and the KV pool.

    Args:
        model: copied to `mesh`, which must divide its heads (else `model.sharding.MeshError`).
        engine: sizes of the pool and of steps. Raises `EngineError` where its KV memory holds no page.
        mesh: `None` leaves the model on the device where it is.
    """

    def __init__(self, model: Transformer, engine: EngineConfig, mesh: Mesh | None = None):
        self.config = model.config
        definition, self._weights = split(shard_model(model, mesh) if mesh else model)
        dtype = engine.kv_dtype or self._weights[0].dtype.name
        # Always placed explicitly: a step returns a placed pool, and the first bucket would compile once more for it.
        sharding = NamedSharding(mesh, KV_SPEC) if mesh else self._weights[0].sharding
        self.layout = kv_layout(self.config, engine, dtype, shards=mesh.shape["tp"] if mesh else 1)
        self._cache = PagedKVCache.create(self.layout, sharding)
        self._step = _step(definition, self.config, mesh)
        self._implementation = engine.attention
        # Tracing is Python and gains nothing from threads; and it looks at the pool, which a step replaces.
        self._tracing = threading.Lock()

    def forward(self, inputs: StepInputs, bucket: Bucket) -> Array:
        """Implements `StepRunner.forward`; the pool is updated in place, because its buffers are donated."""
        with self._tracing:
            logits, self._cache = self._step(bucket, self._implementation, self._weights, self._cache, inputs)
        return logits

    def compile(self, inputs: StepInputs, bucket: Bucket) -> None:
        """Implements `StepRunner.compile`."""
        self._compiled(inputs, bucket)

    def extract(self, pages: Sequence[int], layers: range) -> KVBlock:
        """Implements `StepRunner.extract` by `kvcache.moves.extract`."""
        return moves.extract(self._cache, pages, layers)

    def insert(self, pages: Sequence[int], block: KVBlock) -> Array:
        """Implements `StepRunner.insert` by `kvcache.moves.insert`."""
        self._cache, done = moves.insert(self._cache, pages, block)
        return done

    def warm_up_moves(self, max_pages: int, num_layers: int) -> None:
        """Compiles `extract` and `insert` of up to `max_pages` pages in any `num_layers` layers; before `warm_up`."""
        self._cache = moves.warm_up(self._cache, max_pages, num_layers)

    def step_temp_bytes(self, inputs: StepInputs, bucket: Bucket) -> int:
        """Returns the bytes of scratch memory of the compiled step: far below the pool's, which is never copied."""
        analysis = self._compiled(inputs, bucket).memory_analysis()
        if analysis is None:
            raise EngineError(f"backend {jax.default_backend()!r} does not report what a compiled step allocates.")
        return analysis.temp_size_in_bytes

    def _compiled(self, inputs: StepInputs, bucket: Bucket) -> jax.stages.Compiled:
        with self._tracing:
            lowered = self._step.lower(bucket, self._implementation, self._weights, self._cache, inputs)
        return lowered.compile()  # without the interpreter: several at once


def kv_layout(config: ModelConfig, engine: EngineConfig, dtype: jnp.dtype | str, shards: int) -> KVLayout:
    """Returns the sizes of the pool: `num_pages` if given, else what fits `kv_bytes`, else the devices' free memory.

    Raises:
        EngineError: that memory holds no page.
    """

    def layout(num_pages: int) -> KVLayout:
        return KVLayout(
            num_layers=config.num_layers,
            num_pages=num_pages,
            page_size=engine.page_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=jnp.dtype(dtype).name,
            shards=shards,
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
    """Returns the bytes that the devices have free beside the weights; a fixed figure where none is reported (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if not all(stats):
        return _DEFAULT_KV_BYTES
    return int(_FREE_MEMORY_SHARE * sum(s["bytes_limit"] - s["bytes_in_use"] for s in stats))
