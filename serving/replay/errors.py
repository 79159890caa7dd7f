"""Errors of a replay. Message = what, the value, what to do."""


class ReplayError(Exception):
    """A server that cannot be replayed against, or that stopped answering."""
