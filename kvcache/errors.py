"""Errors of the KV cache. Message = what, the value, what to do."""


class KVCacheError(Exception):
    """Anything that the KV cache refuses."""


class OutOfPagesError(KVCacheError):
    """More pages were asked for than are free or reclaimable; nothing was allocated."""
