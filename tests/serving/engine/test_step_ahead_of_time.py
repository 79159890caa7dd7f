"""What the whole engine step compiles to on devices that are not here."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from kvcache.layout import KVLayout
from kvcache.paged_cache import PagedKVCache
from model.config import ModelConfig
from model.presets import PRESETS
from model.transformer import Transformer, split
from serving.engine.batch import step_inputs
from serving.engine.buckets import Bucket
from serving.engine.scheduler import StepPlan
from serving.engine.step import compute_step
from tests import ahead_of_time

# Heads of 64, which on TPU share rows of 128: the hardest to keep in place.
CONFIG = dataclasses.replace(
    PRESETS["bench-58m"],
    num_layers=2,
    hidden_size=128,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=256,
    vocab_size=512,
)
BUCKETS = {"decode": Bucket(8, 0, 0), "prefill": Bucket(0, 2, 64), "mixed": Bucket(8, 2, 64)}
CHIPS = {"tpu": "v6e:2x2", "cuda": "h200"}


def layout_of(config: ModelConfig, dtype: str) -> KVLayout:
    return KVLayout(
        num_layers=config.num_layers,
        num_pages=2048,
        page_size=64,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
    )


def step_of(
    config: ModelConfig, dtype: str, bucket: Bucket
) -> tuple[Callable[..., tuple[jax.Array, PagedKVCache]], tuple[object, ...]]:
    """The step of a model of random weights, and the shapes of its weights, cache and inputs."""
    layout = layout_of(config, dtype)
    definition, weights = split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), dtype)))
    cache = jax.eval_shape(lambda: PagedKVCache.create(layout))
    step = functools.partial(compute_step, definition, config, None, bucket, None)
    return step, (weights, cache, step_inputs(StepPlan((), ()), bucket, layout, 16))


@pytest.fixture(scope="module")
def no_accelerator_here():
    with ahead_of_time.no_accelerator_here():
        yield


def cases():
    """Every bucket and dtype on every platform. Each takes seconds: by default one of each bucket, and both dtypes."""
    quick = {("decode", "float32"), ("prefill", "bfloat16"), ("mixed", "bfloat16")}
    return [
        pytest.param(platform, name, dtype, marks=[] if (name, dtype) in quick else [pytest.mark.slow])
        for platform in CHIPS
        for name in BUCKETS
        for dtype in ("float32", "bfloat16")
    ]


@pytest.mark.usefixtures("no_accelerator_here")
@pytest.mark.parametrize(("platform", "name", "dtype"), cases())
def test_the_whole_step_compiles_and_copies_no_pool(platform: str, name: str, dtype: str) -> None:
    ahead_of_time.skip_without_compiler(platform)
    step, arguments = step_of(CONFIG, dtype, BUCKETS[name])

    def placed(sharding: NamedSharding) -> tuple[object, ...]:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments)

    compiled = ahead_of_time.compile_for(platform, CHIPS[platform], step, placed, donate=(1,))
    layout = layout_of(CONFIG, dtype)
    assert compiled.memory_analysis().temp_size_in_bytes < layout.page_bytes * layout.num_pages / 20
    # The C++ kernels are the CPU's alone.
    assert "halfmoon" not in compiled.as_text()


def test_heads_of_64_take_the_tpu_kernel() -> None:
    """Two tokens share a row of the engine's pools, so nothing pads them and the kernel also writes the step's KV."""
    step, arguments = step_of(CONFIG, "bfloat16", BUCKETS["decode"])
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=jax.sharding.AbstractDevice("TPU v6 lite", 1, "tpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    assert "paged_attention_decode" in text
    assert "scatter" not in text
    assert "halfmoon" not in text
