"""The engine's own step, cut: which of its arguments are weights, KV and known to both sides."""

import dataclasses
import functools
from typing import Any

import jax

from attention_offload.converter import Role, SplitStep, convert
from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache
from model.config import ModelConfig
from model.transformer import Definition
from serving.engine.batch import StepInputs
from serving.engine.buckets import Bucket
from serving.engine.step import compute_step


@functools.lru_cache(maxsize=256)
def cut_engine_step(
    definition: Definition,
    config: ModelConfig,
    bucket: Bucket,
    implementation: str | None,
    weights: tuple[jax.ShapeDtypeStruct, ...],
    layout: KVLayout,
    inputs: tuple[jax.ShapeDtypeStruct, ...],
) -> SplitStep:
    """Returns the cut step of one shape, the same object for all runners of one model.

    Args:
        definition: the model without its weights.
        config: the model's shape.
        bucket: the step's shape.
        implementation: paged-attention backend; `None` lets the dispatcher choose.
        weights: of each of the model's flat weights.
        layout: of the KV pool.
        inputs: of each field of `StepInputs`, in their order.
    """
    pool: Any = jax.ShapeDtypeStruct(layout.shape, layout.dtype)
    names = [field.name for field in dataclasses.fields(StepInputs)]
    arrays: Any = dict(zip(names, inputs, strict=True))
    # Token ids enter on the dense side; all else that a step is told, both sides know.
    roles: Any = {name: Role.ACTIVATION if name == "tokens" else Role.FREE for name in names}
    return convert(
        functools.partial(compute_step, definition, config, None, bucket, implementation),
        (Role.WEIGHT, Role.KV, StepInputs(**roles)),
        weights,
        PagedKVCache(pool, pool, layout),
        StepInputs(**arrays),
    )
