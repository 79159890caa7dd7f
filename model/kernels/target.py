"""The platform and the kind of device that a call is traced for, which may be another than the process's own."""

import jax


def platform() -> str:
    """Returns the platform of the abstract mesh, which ahead-of-time compilation sets; without one, JAX's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def device_kind() -> str:
    """Returns the kind of device ("TPU v6 lite", "NVIDIA H200"), chosen as `platform` chooses."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind
