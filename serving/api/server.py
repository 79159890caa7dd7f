"""The process that serves an application: its socket, its signals, its shutdown."""

import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI

from serving.api.backend import Backend


class ServerError(Exception):
    """The server cannot start with these settings, or its backend failed."""


def bind(host: str, port: int) -> socket.socket:
    """Returns a socket bound to `host:port`, not yet listening; port 0 takes a free port.

    Bound before the model is loaded, so that a taken port is reported at once. Raises ServerError.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise ServerError(f"Cannot serve on {host}:{port}: {error}. Choose another `--host` or `--port`.") from error
    return bound


def url_of(bound: socket.socket) -> str:
    """Returns the URL of `bound` for clients on this machine."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, backend: Backend, bound: socket.socket, *, drain_s: int, log_level: str = "warning") -> None:
    """Serves `app` until SIGTERM or SIGINT, then refuses new requests and drains open ones for `drain_s` seconds.

    Raises ServerError once `backend`, which `app` serves, has failed and its requests have been answered with that.
    """
    config = uvicorn.Config(
        app, log_level=log_level, access_log=False, timeout_graceful_shutdown=drain_s, timeout_keep_alive=75
    )
    with _signals_end_quietly():
        _Server(config, backend).run(sockets=[bound])
    if backend.failure is not None:
        raise ServerError(str(backend.failure))


class _Server(uvicorn.Server):
    """Shuts down when its backend fails, as it does on a signal."""

    def __init__(self, config: uvicorn.Config, backend: Backend) -> None:
        super().__init__(config)
        self._backend = backend

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._backend.failure is not None


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """Swallows the signal that uvicorn re-raises after shutdown, so that a drained server exits with status 0."""
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
