"""Compiles for TPUs and GPUs that are not here: what a compiler takes, and the memory that the result needs."""

import contextlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_PLUGINS = {"tpu": ("libtpu", "tpu-aot"), "cuda": ("jax_cuda13_plugin", "cuda-aot")}
_GPUS = pathlib.Path(__file__).parent / "model" / "kernels" / "paged_attention"


def skip_without_compiler(platform: str) -> None:
    """Skips the running test where the compiler of `platform` ("tpu" or "cuda") is not installed."""
    module, extra = _PLUGINS[platform]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"no {module}, which compiles for {platform}: pip install '.[{extra}]'")


@contextlib.contextmanager
def no_accelerator_here() -> Iterator[None]:
    """Keeps the compilers from looking for devices, and JAX from storing what no process here can read back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        patch.setenv("TPU_LOG_DIR", "disabled")
        cached = jax.config.jax_enable_compilation_cache
        jax.config.update("jax_enable_compilation_cache", False)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_enable_compilation_cache", cached)
        compilation_cache.reset_cache()


def devices_of(platform: str, chip: str) -> Sequence[jax.Device]:
    """The described devices of a TPU topology ("v6e:2x2") or of a GPU ("h200")."""
    if platform == "tpu":
        return topologies.get_topology_desc(chip, platform="tpu").devices
    described = (_GPUS / f"{chip}.txtpb").read_text()
    return topologies.get_topology_desc(platform="cuda", target_config=described, topology="1x1x1").devices


def compile_for(
    platform: str,
    chip: str,
    function: Callable,
    arguments: Callable[[NamedSharding], Sequence[Any]],
    donate: tuple[int, ...] = (),
) -> jax.stages.Compiled:
    """`function` compiled for one device of `chip`; `arguments(sharding)` makes the shapes of its arguments."""
    mesh = Mesh(np.array(devices_of(platform, chip)[:1]), ("x",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        traced = jax.jit(function, donate_argnums=donate).trace(*arguments(NamedSharding(mesh, PartitionSpec())))
        return traced.lower(lowering_platforms=(platform,)).compile()
