"""Errors of the engine. Message = what, the value, what to do."""


class EngineError(Exception):
    """Anything that an engine refuses."""


class RequestRefusedError(EngineError):
    """A request that this engine can never serve; nothing was queued."""
