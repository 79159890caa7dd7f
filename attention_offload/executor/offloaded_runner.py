"""An engine's steps with attention offloaded: a `StepRunner` over two devices."""

import threading
from collections.abc import Sequence

import jax
from jax import Array
from jax.sharding import SingleDeviceSharding

from attention_offload.executor.engine_step import cut_engine_step
from attention_offload.executor.placed_step import PlacedStep
from kvcache import moves
from kvcache.kv_block import KVBlock
from kvcache.paged_cache import PagedKVCache
from model.transformer import Transformer, split
from serving.engine.batch import StepInputs
from serving.engine.buckets import Bucket
from serving.engine.runner import kv_layout
from serving.engine.types import EngineConfig


class OffloadedRunner:
    """Runs a model with its weights on one device, and its KV and attention on another (Lamina, section 3).

    Args:
        model: moved to `dense`.
        engine: sizes of the pool and of steps. Raises `EngineError` where its KV memory holds no page.
        dense: device of the weights.
        attention: device of the KV pool.
    """

    def __init__(self, model: Transformer, engine: EngineConfig, *, dense: jax.Device, attention: jax.Device) -> None:
        self.config = model.config
        self._definition, weights = split(model)
        self._weights = jax.device_put(weights, dense)
        self.layout = kv_layout(self.config, engine, engine.kv_dtype or weights[0].dtype.name, shards=1)
        self._cache = PagedKVCache.create(self.layout, SingleDeviceSharding(attention))
        self._dense, self._attention = dense, attention
        self._implementation = engine.attention
        self._steps: dict[Bucket, PlacedStep] = {}
        # Tracing is Python and gains nothing from threads.
        self._tracing = threading.Lock()

    @property
    def crossed_bytes(self) -> int:
        """Bytes of activations that went from one device to the other so far."""
        return sum(step.crossed_bytes for step in self._steps.values())

    def forward(self, inputs: StepInputs, bucket: Bucket) -> Array:
        """Implements `StepRunner.forward`: dispatches all slices and waits for none."""
        logits, self._cache = self._step(inputs, bucket)(self._weights, self._cache, inputs)
        return logits

    def compile(self, inputs: StepInputs, bucket: Bucket) -> None:
        """Implements `StepRunner.compile`."""
        self._step(inputs, bucket).compile()

    def extract(self, pages: Sequence[int], layers: range) -> KVBlock:
        """Implements `StepRunner.extract`, from the attention device."""
        return moves.extract(self._cache, pages, layers)

    def insert(self, pages: Sequence[int], block: KVBlock) -> Array:
        """Implements `StepRunner.insert`, into the attention device."""
        self._cache, done = moves.insert(self._cache, pages, block)
        return done

    def _step(self, inputs: StepInputs, bucket: Bucket) -> PlacedStep:
        with self._tracing:
            if bucket not in self._steps:
                cut = cut_engine_step(
                    self._definition,
                    self.config,
                    bucket,
                    self._implementation,
                    tuple(_shape(weight) for weight in self._weights),
                    self.layout,
                    tuple(_shape(leaf) for leaf in jax.tree.leaves(inputs)),
                )
                self._steps[bucket] = PlacedStep(cut, self._dense, self._attention)
            return self._steps[bucket]


def _shape(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)
