"""The platform and device that a call is being traced for."""

import jax


def platform() -> str:
    """That of the abstract mesh, which ahead-of-time compilations set for devices not at hand; else jax's default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def device_kind() -> str:
    """The kind of device, as `platform`."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device is not None else jax.devices()[0].device_kind
