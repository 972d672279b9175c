"""Around every request: an id, one line in the log, and no traceback to the client.

Pure ASGI: Starlette's BaseHTTPMiddleware would hide disconnects from the handlers.
"""

from __future__ import annotations

import logging
import time
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaserve import logs
from deltaserve.server.errors import error_response
from deltaserve.server.sse import ClientGoneError

access_log = logging.getLogger("deltaserve.access")

CLIENT_CLOSED_REQUEST = 499  # nginx's word for it; only the log sees it


class RequestContext:
    """Gives each request an id (``scope["state"]["request_id"]``, header ``x-request-id``)."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        logs.request_id.set(request_id)  # of this request's task alone
        started = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientGoneError:
            status = CLIENT_CLOSED_REQUEST
        except Exception as error:
            response = error_response(error)
            if not status:
                await response(scope, receive, send_with_id)
        finally:
            _log(scope, status, time.perf_counter() - started, request_id)


def _log(scope: Scope, status: int, seconds: float, request_id: str) -> None:
    # The raw path is still percent-encoded: nobody can write lines of their own into the log.
    path, ms = scope.get("raw_path", b"").decode("latin-1"), seconds * 1e3
    caller = scope["state"].get("caller")
    about = {"method": scope["method"], "path": path, "status": status, "ms": round(ms, 1)}
    about |= {} if caller is None else {"tenant": caller.tenant.id, "key": caller.key.id}
    access_log.info(
        "%s %s %d %.0f ms %s", scope["method"], path, status, ms, request_id,
        extra={logs.FIELDS: about},
    )  # fmt: skip
