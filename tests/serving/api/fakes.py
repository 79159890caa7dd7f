"""An engine that fails when it is told to: for what a real engine cannot be made to show."""

import time

from serving.engine.errors import RequestRefusedError
from serving.engine.types import EngineStats, Request, TokenEvent


class ScriptedEngine:
    """Repeats each prompt, one token per step, until `max_tokens`.

    Attributes:
        aborted: ids that were aborted while running.
        broken: whether its next step raises.
        step_s: how long a step takes.
        steps: steps so far.
    """

    def __init__(self, *, step_s: float = 0.0, max_model_len: int = 2000) -> None:
        self.aborted: list[str] = []
        self.broken = False
        self.steps = 0
        self.step_s = step_s
        self._max_model_len = max_model_len
        self._running: dict[str, tuple[Request, int]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._running)

    def add(self, request: Request) -> None:
        if len(request.prompt) > self._max_model_len:
            raise RequestRefusedError(f"{len(request.prompt)} tokens never fit.")
        self._running[request.id] = (request, 0)

    def abort(self, request_id: str) -> bool:
        if self._running.pop(request_id, None) is None:
            return False
        self.aborted.append(request_id)
        return True

    def step(self) -> list[TokenEvent]:
        self.steps += 1
        if self.broken:
            raise RuntimeError("the device is gone")
        time.sleep(self.step_s)
        return [self._next(request, count) for request, count in list(self._running.values())]

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._running), pages_total=10, pages_used=len(self._running), steps=self.steps)

    def _next(self, request: Request, count: int) -> TokenEvent:
        token = request.prompt[count % len(request.prompt)]
        self._running[request.id] = (request, count + 1)
        finish = "length" if count + 1 == request.sampling.max_tokens else None
        if finish:
            del self._running[request.id]
        top = tuple((token + i, -1.0 - i) for i in range(request.sampling.logprobs or 0))
        return TokenEvent(request.id, token, -0.5, top, finish)
