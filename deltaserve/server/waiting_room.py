"""While models are loaded, whoever asks is told to wait: readiness is red, not unreachable."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from deltaserve import __version__
from deltaserve.server.errors import ApiError, error_response, json_response
from deltaserve.server.middleware import RequestContext

LOADING = "the models are being loaded"
RETRY_SECONDS = "5"


async def _wait(scope: Scope, receive: Receive, send: Send) -> None:
    """The routes that need no key say what they will say later; all others are not there yet."""
    if scope["path"] == "/health":
        response = json_response({"status": "loading"})
    elif scope["path"] == "/version":
        response = json_response({"version": __version__})
    else:
        response = error_response(ApiError(503, LOADING, code="loading"))
        response.headers["retry-after"] = RETRY_SECONDS
    response.headers["connection"] = "close"  # the next request shall find the real server
    await response(scope, receive, send)


waiting_app: ASGIApp = RequestContext(_wait)


@contextlib.contextmanager
def waiting_room(listener: socket.socket, protocol: type[object]) -> Iterator[None]:
    """Answer on ``listener`` from a thread until the block ends; the socket then waits for the
    next who serves on it.

    Whoever connects in between is kept by the kernel, so that nobody is refused.
    """
    settings = uvicorn.Config(
        waiting_app, http=protocol, log_config=None, log_level="warning",  # type: ignore[arg-type]
        access_log=False, lifespan="off", server_header=False, timeout_graceful_shutdown=1,
    )  # fmt: skip
    server = uvicorn.Server(settings)
    own = listener.dup()  # uvicorn closes what it served on
    thread = threading.Thread(target=server.run, args=([own],), name="deltaserve-loading")
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join()
        own.close()
