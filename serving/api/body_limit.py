"""Limits on request bodies, before anything reads them: their size, and the silence between their pieces."""

import asyncio

from fastapi.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.api.errors import ApiError

MAX_BODY_BYTES = 16 * 2**20
_SILENCE_S = 60.0


class BodyLimit:
    """ASGI middleware that answers 413 to a body above `max_bytes`, and 408 to one that stops for `silence_s` seconds.

    Without it a body is collected in memory however long it is, and a client that is gone is waited for forever.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int = MAX_BODY_BYTES, silence_s: float = _SILENCE_S) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._silence_s = silence_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if length.isdigit() and int(length) > self._max_bytes:
            await ApiError(413, self._too_large).response()(scope, receive, send)
            return
        await self._app(scope, self._limited(receive), send)

    def _limited(self, receive: Receive) -> Receive:
        received, more = 0, True

        async def limited() -> Message:
            nonlocal received, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout(self._silence_s):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(
                    408, f"No piece of the body came for {self._silence_s:g} s; send it again"
                ) from None
            received += len(message.get("body", b""))
            more = message.get("more_body", False)
            if received > self._max_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return limited

    @property
    def _too_large(self) -> str:
        return f"The body is larger than {self._max_bytes} bytes, the most that this server reads; send less at once."
