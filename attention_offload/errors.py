"""Errors of attention offloading: what is wrong, which value, what to do instead."""


class OffloadError(ValueError):
    """Base of every error that this package raises on purpose."""


class DeviceTableError(OffloadError):
    """A device file has a missing, unknown or impossible figure."""


class UnknownDeviceError(OffloadError):
    """No device of that name is in the table."""


class CapacityError(OffloadError):
    """A model, or the KV of a single request, fits on none of the devices offered."""
