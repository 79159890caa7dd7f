"""The TPU kernels, compiled for chips that are not here: does Mosaic take them, what memory and traffic they cost."""

import functools

import jax
import jax.numpy as jnp
import pytest

from model.kernels.paged_attention import write_and_attend
from tests import ahead_of_time
from tests.model.kernels.paged_attention import cases
from tests.model.kernels.paged_attention.tpu_cases import CHUNKS, DECODES, Step, write_and_attend_in_every_layer

CHIPS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
every_chip = pytest.mark.parametrize("chip", CHIPS)


def on_chips(names, slow: set[str]):
    """Every name on every chip. Each takes seconds to compile: the first name runs on all chips, the others on the
    oldest and the newest, and what is slow, or on chips between those, with `-m slow`.
    """
    first = next(iter(names))
    return pytest.mark.parametrize(
        ("chip", "name"),
        [
            pytest.param(
                chip,
                name,
                marks=[pytest.mark.slow] if name in slow or (name != first and chip in CHIPS[1:-1]) else [],
            )
            for name in names
            for chip in CHIPS
        ],
    )


@pytest.fixture(scope="module", autouse=True)
def no_tpu_here():
    ahead_of_time.skip_without_compiler("tpu")
    with ahead_of_time.no_accelerator_here():
        yield


compile_for = functools.partial(ahead_of_time.compile_for, "tpu")


@on_chips(DECODES, {"fp8", "int8, page 128", "int8, page 32"})
def test_decode_moves_the_kv_once_and_copies_nothing(chip: str, name: str) -> None:
    step = DECODES[name]
    compiled = compile_for(chip, step.attend, lambda sharding: [step.batch(sharding)])
    assert compiled.as_text().count("tpu_custom_call") == 1
    assert compiled.memory_analysis().temp_size_in_bytes < step.page_bytes + 2 * step.spread_bytes
    accessed = compiled.cost_analysis()["bytes accessed"]
    # A window begins inside a page, and pages move whole.
    edge = step.rows * step.page_bytes if step.sliding_window else 0
    assert step.kv_bytes <= accessed < 1.05 * step.kv_bytes + edge


@on_chips(CHUNKS, {"int8", "head_dim 64"})
def test_chunks_beside_decode_rows_copy_no_pool(chip: str, name: str) -> None:
    step = CHUNKS[name]
    compiled = compile_for(chip, step.attend, lambda sharding: [step.batch(sharding)])
    assert compiled.as_text().count("tpu_custom_call") == 2
    # The two kernels, for decode rows and for chunks, each have results and log-sum-exps; both are merged.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * (
        step.page_bytes + step.spread_bytes + (2 if step.head_dim == 64 else 1) * step.lse_bytes
    )


@every_chip
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(DECODES["bf16"], id="decode"),
        pytest.param(DECODES["head_dim 64"], id="head_dim 64", marks=pytest.mark.slow),
        pytest.param(CHUNKS["bf16"], id="mixed", marks=pytest.mark.slow),
    ],
)
def test_a_layer_loop_writes_and_attends_in_place(chip: str, step: Step) -> None:
    layers = 4

    def arguments(sharding):
        def array(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        q, cache, *rows = step.batch(sharding)
        pool = array((layers * cache.k.shape[0], *cache.k.shape[1:]), cache.k.dtype)
        new = array((step.tokens, step.kv_heads, step.head_dim), jnp.bfloat16)
        return [cases.Cache(pool, pool), q, new, new, array((step.tokens,), jnp.int32), *rows]

    run = functools.partial(write_and_attend_in_every_layer, step, layers)
    compiled = compile_for(chip, run, arguments, donate=(0,))
    decodes = step.max_query_len == 1
    assert compiled.as_text().count("tpu_custom_call") == (1 if decodes else 3)
    # Beside a chunk its queries and results, and those of heads of 64 spread; no layer's pool is copied.
    temp, most = compiled.memory_analysis().temp_size_in_bytes, 4 * step.page_bytes
    most += 0 if decodes else 4 * (step.q_bytes + step.lse_bytes)
    most += 2 * (step.spread_bytes - step.q_bytes)
    assert temp < most < layers * step.kv_bytes / 20


@every_chip
def test_a_decode_that_writes_its_kv_moves_little_more_than_one_that_does_not(chip: str) -> None:
    """Of each row, a tile of 16 tokens instead of one; XLA's own scatter would be an operation more."""
    step = DECODES["bf16"]

    def arguments(sharding):
        q, cache, *rows = step.batch(sharding)
        new = jax.ShapeDtypeStruct((step.tokens, step.kv_heads, step.head_dim), jnp.bfloat16, sharding=sharding)
        slots = jax.ShapeDtypeStruct((step.tokens,), jnp.int32, sharding=sharding)
        return [q, new, new, slots, cache, *rows]

    compiled = compile_for(chip, functools.partial(write_and_attend, max_query_len=1), arguments, donate=(4,))
    assert "scatter" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes < step.page_bytes + 2 * step.q_bytes
    assert step.kv_bytes <= compiled.cost_analysis()["bytes accessed"] < 1.05 * step.kv_bytes
