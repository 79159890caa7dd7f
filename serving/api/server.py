"""A process that serves an application: its socket, its signals, its end."""

import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI


class ServerError(Exception):
    """The server cannot start as it was asked to."""


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to `host:port`, which clients cannot reach before it listens; port 0 takes a free one.

    Raises ServerError if the address cannot be had, so that nothing is loaded in vain.
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
    """Where clients on this machine find `bound`."""
    host, port = bound.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, bound: socket.socket, *, drain_s: int, log_level: str = "warning") -> None:
    """Serves `app` until SIGTERM or SIGINT; then takes no more requests and gives the open ones `drain_s` seconds."""
    config = uvicorn.Config(
        app, log_level=log_level, access_log=False, timeout_graceful_shutdown=drain_s, timeout_keep_alive=75
    )
    with _signals_end_quietly():
        uvicorn.Server(config).run(sockets=[bound])


@contextlib.contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more at the end; a server that has drained has nothing to die of."""
    handlers = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
