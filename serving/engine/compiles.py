"""Counts the XLA compilations of this process, by whatever code; after warm-up an engine must cause none."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _count
    del duration_secs, kwargs
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiles() -> int:
    """Returns the number of compilations, hits of the persistent cache included, since the import of this module."""
    return _count
