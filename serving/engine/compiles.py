"""Counts XLA compilations of this process, whoever caused them; after warm-up an engine must cause none."""

import jax

_EVENT = "/jax/core/compile/backend_compile_duration"
_count = 0


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    global _count
    del duration_secs, kwargs
    _count += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_listen)


def compiles() -> int:
    """Compilations (persistent-cache hits included) since this module was imported."""
    return _count
