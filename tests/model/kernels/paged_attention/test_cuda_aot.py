"""The Hopper kernels as machine code, made and inspected without a GPU."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax._src.mesh import AbstractDevice

from model.kernels.paged_attention import paged_attention
from tests.model.kernels.paged_attention.cases import Batch, Cache
from tests.model.kernels.paged_attention.cuda_aot import CASES

_ROOT = pathlib.Path(__file__).parents[4]
# What a thread block may have on Hopper.
_SHARED_BYTES = 227 * 1024


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[dict[str, int], str]]:
    """By case: its bytes, and what the compiler said of its kernels."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs the CUDA plugin of jax: pip install -e '.[cuda-aot]'")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
    }
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.model.kernels.paged_attention.cuda_aot"],
        cwd=_ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    results, said = {}, ""
    for line in run.stdout.splitlines():
        if line.startswith('{"case"'):
            result = json.loads(line)
            results[result.pop("case")] = (result, said)
            said = ""
        else:
            said += line + "\n"
    return results


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_spills_and_shared_memory_fits(case, compiled) -> None:
    said = compiled[case.name][1]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    # Decode and prefill, or a decode that is split and the kernel that puts its parts together.
    assert len(spills) == 2, said
    assert set(spills) == {("0", "0")}
    if jax.__version_info__ >= (0, 11):  # 0.10 does not say
        shared = [int(size) for size in re.findall(r"smem_scratch_bytes=(\d+)", said)]
        assert len(shared) == len(spills), said
        assert max(shared) <= _SHARED_BYTES
        # Two decode blocks share a multiprocessor, each with 1 KiB of the driver's. What puts parts together has none.
        decode = min(size for size in shared if size)
        assert decode + 2048 <= 228 * 1024 // 2 + 1024


@pytest.mark.parametrize("case", [case.name for case in CASES if case.layers])
def test_layers_write_and_attend_in_place(case: str, compiled) -> None:
    """Temporary bytes are tiles of queries, a twentieth of the pools: no layer copies them."""
    size = compiled[case][0]
    assert size["temp"] < size["pool"] / 20


def test_lowers_for_cuda_without_the_plugin() -> None:
    """What Pallas refuses is caught on any machine; what the assembler refuses needs the plugin."""
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))
    pool = jax.ShapeDtypeStruct((16, 2, 64, 64), jnp.bfloat16)
    numbers = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3, 4), (3,), (4,))]

    def attend(q, k, v, *ragged):
        return paged_attention(*Batch(q, Cache(k, v), *ragged), max_query_len=64, implementation="mosaic_gpu")

    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(attend).trace(jax.ShapeDtypeStruct((66, 4, 64), jnp.bfloat16), pool, pool, *numbers)
        lowered = traced.lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 2
