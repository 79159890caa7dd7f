"""What an engine's step lowers to on devices that are not here."""

import dataclasses
import functools

import jax
from flax import nnx

from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache
from model.presets import PRESETS
from model.transformer import Transformer, split
from serving.engine.batch import step_inputs
from serving.engine.buckets import Bucket
from serving.engine.runner import _forward
from serving.engine.scheduler import StepPlan


def test_heads_of_64_take_the_tpu_kernel() -> None:
    """Two tokens share a row of the engine's pools, so nothing pads them and the kernel also writes the step's KV."""
    config = dataclasses.replace(PRESETS["bench-58m"], num_layers=2)
    assert config.head_dim == 64
    layout = KVLayout(
        num_layers=config.num_layers,
        num_pages=64,
        page_size=64,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype="bfloat16",
    )
    definition, weights = split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), "bfloat16")))
    cache = jax.eval_shape(lambda: PagedKVCache.create(layout))
    assert cache.k.shape[-1] == 128
    bucket = Bucket(8, 0, 0)
    inputs = step_inputs(StepPlan((), ()), bucket, layout, 16)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        step = jax.jit(functools.partial(_forward, definition, config, None, bucket, None))
        text = step.trace(weights, cache, inputs).lower(lowering_platforms=("tpu",)).as_text()
    assert "paged_attention_decode" in text
    assert "scatter" not in text
