"""The end of a server: what has begun may finish, nothing new begins, readiness is red."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Receive, Scope, Send

from deltaserve.server.errors import ApiError, error_response

DRAINING = "the server is shutting down"


class Drain:
    """Counts the requests in flight, and refuses new ones once ``begin`` was called."""

    def __init__(self) -> None:
        self.in_flight = 0
        self._began: float | None = None

    @property
    def begun(self) -> bool:
        return self._began is not None

    def begin(self) -> None:
        self._began = time.monotonic()

    def over(self, limit_s: float) -> bool:
        """Has all that was in flight finished, or had its time?"""
        if self._began is None:
            return False
        return self.in_flight == 0 or time.monotonic() - self._began >= limit_s


class DrainGate:
    """Pure ASGI middleware: everything under /v1 is work; health, readiness and so on are not."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not f"{scope['path']}/".startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        if self._drain.begun:
            refusal = error_response(ApiError(503, DRAINING, code="draining"))
            refusal.headers["connection"] = "close"
            await refusal(scope, receive, send)
            return
        self._drain.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.in_flight -= 1
