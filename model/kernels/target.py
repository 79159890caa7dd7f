"""The platform and the kind of device that a call is traced for, which may be another than the process's own."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def platform() -> str:
    """Returns the platform of the abstract mesh, which ahead-of-time compilation sets; without one, JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def device_kind() -> str:
    """Returns the kind of device ("TPU v6 lite", "NVIDIA H200"), chosen as `platform` chooses."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind


def by_platform(*operands: Any, cpu: Callable, default: Callable, **others: Callable) -> Any:
    """Calls the function of the platform that the call is traced for; `others` are named "tpu", "cuda" and so on."""
    if platform() == "cpu":
        return cpu(*operands)
    return lax.platform_dependent(*operands, cpu=cpu, default=default, **others)
