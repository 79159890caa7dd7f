"""Errors of the Conductor. Message = what, the value, what to do."""


class ConductorError(ValueError):
    """A scheduling setting that cannot be meant."""
