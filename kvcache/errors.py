"""Errors of the KV cache. Message = what, the value, what to do."""


class KVCacheError(Exception):
    """Base of all errors of the KV cache."""


class OutOfPagesError(KVCacheError):
    """More pages were asked for than are free or reclaimable; nothing was allocated."""
