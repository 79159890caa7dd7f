"""Errors of the simulator. Message = what, the value, what to do."""


class SimulatorError(ValueError):
    """A cluster or performance model that cannot be simulated."""
