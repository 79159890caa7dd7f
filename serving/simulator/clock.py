"""The virtual clock."""

from collections.abc import Callable
from typing import Protocol, TypeVar

_Argument = TypeVar("_Argument")


class Timer(Protocol):
    """Calls `handler(argument, time)` when the clock gets to `time`; first come, first served within a moment."""

    def __call__(self, time: float, handler: Callable[[_Argument, float], None], argument: _Argument) -> None: ...
