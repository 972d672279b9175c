"""Who sends a request, and whether that is allowed: decided before anything of it is read.

Pure ASGI, like the rest of the middleware. What is found is left in the request's state:
``caller`` for a tenant, ``ticket`` for its place in the limits, ``actor`` for the administrator.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaserve.errors import AuthenticationError, ForbiddenError
from deltaserve.server.errors import error_response
from deltaserve.server.metrics import Metrics
from deltaserve.server.office import Office
from deltaserve.tenancy.accounts import Caller
from deltaserve.tenancy.limits import Ticket

ADMIN = "admin"
ADMIN_PATHS = (
    "/v1/audit", "/v1/deltas", "/v1/keys", "/v1/load_lora_adapter", "/v1/stats", "/v1/tenants",
    "/v1/unload_lora_adapter", "/metrics",
)  # fmt: skip
"""For the administrator only; they and what is below them."""
SHARED_PATHS = ("/v1/key", "/v1/models", "/v1/usage")
"""For tenants and the administrator, who sees all of it."""
WRONG_KEY = "Missing or wrong API key: send it as 'Authorization: Bearer KEY'."


def is_below(path: str, parents: tuple[str, ...]) -> bool:
    return any(f"{path}/".startswith(f"{parent}/") for parent in parents)


def is_guarded(path: str) -> bool:
    return is_below(path, ("/v1", "/metrics"))


def bearer(scope: Scope) -> str:
    """The key that came, or nothing, which is no key."""
    scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def is_key(sent: str, sha256: bytes | None) -> bool:
    """In a time that depends on neither."""
    # Header values are Latin-1 on the wire.
    given = hashlib.sha256(sent.encode("latin-1")).digest()
    return sha256 is not None and hmac.compare_digest(given, sha256)


def caller_of(request: Request) -> Caller | None:
    """The tenant; None for the administrator, and where there are no tenants."""
    return getattr(request.state, "caller", None)


class SingleKey:
    """One key for everything, or none: for a single user."""

    def __init__(self, app: ASGIApp, sha256: bytes) -> None:
        self._app = app
        self._sha256 = sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        guarded = scope["type"] == "http" and is_guarded(scope["path"])
        if guarded and not is_key(bearer(scope), self._sha256):
            await error_response(AuthenticationError(WRONG_KEY))(scope, receive, send)
            return
        await self._app(scope, receive, send)


class TenantKeys:
    """A key for each tenant, and one for the administrator, who cannot use the models."""

    def __init__(
        self, app: ASGIApp, office: Office, admin_sha256: bytes | None, metrics: Metrics
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._office = office
        self._admin_sha256 = admin_sha256

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_guarded(scope["path"]):
            await self._app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        caller: Caller | None = None
        try:
            self._identify(bearer(scope), scope["path"], state)
            caller = state.get("caller")
            # Questions are free; work is what a request is limited in.
            if caller is not None and scope["method"] == "POST":
                state["ticket"] = self._office.limiter.enter(caller.subjects)
        except Exception as error:
            self._metrics.refuse(error, caller.tenant.id if caller is not None else None)
            await error_response(error)(scope, receive, self._with_limits(send, state))
            return
        try:
            await self._app(scope, receive, self._with_limits(send, state))
        finally:
            if "ticket" in state:
                state["ticket"].settle(0)  # no effect if it was settled for what it used

    def _identify(self, key: str, path: str, state: dict[str, Any]) -> None:
        """Raises AuthenticationError, ForbiddenError."""
        if is_key(key, self._admin_sha256):
            if not is_below(path, ADMIN_PATHS + SHARED_PATHS):
                raise ForbiddenError("The admin key manages; use a tenant's key for the models.")
            state["actor"] = ADMIN
            return
        state["caller"] = self._office.accounts.authenticate(key)
        if is_below(path, ADMIN_PATHS):
            raise ForbiddenError("This needs the admin key.")

    def _with_limits(self, send: Send, state: dict[str, Any]) -> Send:
        """Answers to tenants say what is left of their limits."""
        caller: Caller | None = state.get("caller")
        if caller is None:
            return send

        async def send_with_limits(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._office.limiter.headers(caller.subjects).items():
                    headers[name] = value
            await send(message)

        return send_with_limits


def ticket_of(request: Request) -> Ticket | None:
    """The place of a tenant's request in its limits."""
    return getattr(request.state, "ticket", None)
