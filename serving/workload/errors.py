"""Errors of workloads. Message = what, the value, what to do."""


class TraceError(ValueError):
    """A trace that cannot be read; names the file and the line."""
