"""GET /v1/audit: who changed what, for the administrator."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query, Response

from deltaserve.errors import RequestError
from deltaserve.server.errors import json_response
from deltaserve.tenancy import audit
from deltaserve.tenancy.accounts import Accounts

MAX_LINES = 1000
LineId = Annotated[int, Query(ge=1, le=2**62)]


def audit_router(accounts: Accounts) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/audit")
    async def read_audit(limit: int = 100, before: LineId | None = None) -> Response:
        """The latest changes first; ``before``: the id at which the last page ended."""
        if not 1 <= limit <= MAX_LINES:
            raise RequestError(f"limit must be from 1 to {MAX_LINES}", param="limit")
        lines = await asyncio.to_thread(audit.read, accounts.path, limit=limit, before_id=before)
        return json_response({"object": "list", "data": lines})

    return router
