"""GET /console: a page for people. Static files; what they show comes from the API's own routes.

The page holds no data, so it needs no key. It may run no script but its own files, and talk to
nobody but this server: the headers say so to the browser.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from starlette.responses import RedirectResponse

from deltaserve.errors import NotFoundError

PAGE = "index.html"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    # No text can become markup or code, even by a mistake in our own scripts.
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "content-security-policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    # Asked again each time, so that an upgraded server never meets an older page's scripts.
    "cache-control": "no-cache",
}


def console_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)
    answers = {name: _answer(name, content) for name, content in _read().items()}

    def answer(name: str, request: Request) -> Response:
        if name not in answers:
            raise NotFoundError("the console has no such file")
        content, headers = answers[name]
        if request.headers.get("if-none-match") == headers["etag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers)

    @router.get("/console")
    async def page(request: Request) -> Response:
        return answer(PAGE, request)

    @router.get("/console/")
    async def moved() -> Response:
        # Relative, so that it holds behind a proxy that adds a prefix.
        return RedirectResponse("../console", headers=HEADERS)

    @router.get("/console/{name}")
    async def file(name: str, request: Request) -> Response:
        return answer(name, request)

    return router


def _read() -> dict[str, bytes]:
    """All files, by name: what is asked for never becomes a path."""
    folder = files("deltaserve.server") / "console"
    return {
        item.name: item.read_bytes()
        for item in folder.iterdir()
        if any(item.name.endswith(kind) for kind in KINDS)
    }


def _answer(name: str, content: bytes) -> tuple[bytes, dict[str, str]]:
    kind = next(kind for end, kind in KINDS.items() if name.endswith(end))
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return content, {**HEADERS, "content-type": kind, "etag": etag}
