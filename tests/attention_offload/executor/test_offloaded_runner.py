"""The engine with its attention on another device: the same bits, and nothing on the wrong device."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attention_offload.executor.offloaded_runner import OffloadedRunner
from model.config import ModelConfig
from model.sampling_params import SamplingParams
from model.transformer import Transformer
from serving.engine.engine import Engine
from serving.engine.runner import ModelRunner
from serving.engine.types import EngineConfig, Generation
from serving.request import Request

CONFIG = ModelConfig(
    model_type="qwen3",
    vocab_size=97,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=64,
    max_position_embeddings=256,
    qk_norm=True,
    tie_embeddings=True,
)
# So few pages that sequences are preempted.
ENGINE = EngineConfig(page_size=8, num_pages=17, max_batch=4, token_budget=16, max_prefill_rows=2, max_model_len=96)
SAMPLING = [
    SamplingParams(temperature=0.0, max_tokens=12, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=3, max_tokens=9, logprobs=2, ignore_eos=True),
]


@pytest.fixture(scope="module", params=[jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return Transformer(CONFIG, nnx.Rngs(0), request.param)


def _offloaded(model: Transformer) -> tuple[OffloadedRunner, Engine]:
    dense, attention = jax.devices()[1:3]
    runner = OffloadedRunner(model, ENGINE, dense=dense, attention=attention)
    return runner, Engine(runner, ENGINE)


def _prompts(count: int, length: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 97, 20).tolist()
    return [shared + rng.integers(0, 97, length).tolist() for _ in range(count)]


def _served(engine: Engine, count: int = 6) -> list[Generation]:
    return engine.generate(_prompts(count, 17), [SAMPLING[index % 2] for index in range(count)])


def test_tokens_and_log_probabilities_are_those_of_one_device(model: Transformer) -> None:
    whole = Engine(ModelRunner(model, ENGINE), ENGINE)
    _, engine = _offloaded(model)
    want = _served(whole)
    assert _served(engine) == want
    assert engine.stats().prefix_hit_tokens == whole.stats().prefix_hit_tokens > 0
    assert engine.stats().preemptions == whole.stats().preemptions > 0


def test_nothing_is_compiled_after_warm_up_and_an_abort_frees_its_pages(model: Transformer) -> None:
    _, engine = _offloaded(model)
    engine.warm_up()
    engine.add(Request(id="a", prompt=tuple(_prompts(1, 17)[0]), sampling=SAMPLING[0]))
    engine.step()
    assert engine.abort("a")
    _served(engine)
    stats = engine.stats()
    assert (stats.compiles_after_warm_up, stats.pages_used) == (0, 0)


def test_weights_and_kv_stay_where_they_are_and_only_activations_cross(model: Transformer) -> None:
    runner, engine = _offloaded(model)
    dense, attention = jax.devices()[1:3]
    held = _bytes_by_device()
    _served(engine)
    grown = {device: total - held[device] for device, total in _bytes_by_device().items()}
    pool = 2 * np.prod(runner.layout.shape) * jnp.dtype(runner.layout.dtype).itemsize
    assert all(grown[device] < pool for device in (dense, attention))
    # One decode step of one row: (2 + 2 / G) e B d bytes a layer, and nothing else.
    before = runner.crossed_bytes
    engine.generate([[5]], SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True))
    itemsize = jnp.dtype(runner.layout.dtype).itemsize
    rows = 32 + 1  # a prompt of one token takes the smallest prefill bucket; the next token one row
    assert (runner.crossed_bytes - before) % (CONFIG.num_layers * itemsize * 16 * (2 * 4 + 2 * 2)) == 0
    assert runner.crossed_bytes - before <= rows * CONFIG.num_layers * itemsize * 16 * (2 * 4 + 2 * 2)


def _bytes_by_device() -> dict[Any, int]:
    totals = dict.fromkeys(jax.devices(), 0)
    for array in jax.live_arrays():
        if len(array.devices()) == 1:
            totals[next(iter(array.devices()))] += array.nbytes
    return totals


def test_kv_leaves_one_runner_and_enters_the_other_kind_bit_for_bit(model: Transformer) -> None:
    runner, engine = _offloaded(model)
    _served(engine)
    block = runner.extract([3, 1, 7], range(CONFIG.num_layers)).to_host()
    other = ModelRunner(model, ENGINE)
    done = other.insert([0, 5, 2], block)
    done.block_until_ready()
    back = other.extract([0, 5, 2], range(CONFIG.num_layers)).to_host()
    np.testing.assert_array_equal(np.asarray(back.k), np.asarray(block.k))
    np.testing.assert_array_equal(np.asarray(back.v), np.asarray(block.v))
