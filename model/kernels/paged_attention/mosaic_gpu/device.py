"""The GPU that is compiled for, and how its kernels are compiled or interpreted."""

from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu as plgpu

_HOPPER_NAMES = ("NVIDIA H100", "NVIDIA H200", "NVIDIA H800", "NVIDIA H20", "NVIDIA GH200")
_HOPPER_CORES = 132


def compute_capability() -> str | None:
    """Of the GPU that is compiled for; None where only an unknown name is known of it."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return "9.0" if described.device_kind.startswith(_HOPPER_NAMES) else None
    return getattr(jax.devices()[0], "compute_capability", None)


def cores() -> int:
    """Multiprocessors of the GPU that is compiled for; those of an H100 or H200 where it does not say."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is not None:
        return described.num_cores or _HOPPER_CORES
    return getattr(jax.devices()[0], "core_count", _HOPPER_CORES)


def compiler_params() -> plgpu.CompilerParams:
    """Rows are reduced within a warp, so no shared memory is set aside to do it across warps."""
    return plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0)


def interpreter() -> Any:
    """Runs a kernel on CPU, slowly: threads, barriers and TMA are simulated, and races are reported."""
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True, out_of_bounds_reads="uninitialized")
