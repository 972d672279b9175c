"""The administrator's routes for tenants' keys."""

from __future__ import annotations

import asyncio
import math
from typing import Any

from fastapi import APIRouter, Request, Response

from deltaserve.errors import RequestError
from deltaserve.server.auth import ADMIN
from deltaserve.server.errors import json_response
from deltaserve.server.reading import read_object
from deltaserve.tenancy.accounts import Accounts
from deltaserve.tenancy.keys import Key
from deltaserve.tenancy.tenants import parse_duration

DEFAULT_OVERLAP = "24h"


def keys_router(accounts: Accounts) -> APIRouter:
    router = APIRouter()

    def key_card(key: Key) -> dict[str, Any]:
        return {
            "object": "key",
            "id": key.id,
            "tenant": key.tenant,
            **key.settings.model_dump(),
            "created": int(key.created) or None,
            "expires": None if math.isinf(key.expires) else int(key.expires),
            "source": "file" if accounts.is_from_file(key) else "api",
        }

    def new_key_card(secret: str, key: Key) -> Response:
        # The only time that the key is seen: no cache on the way may keep it.
        return json_response({**key_card(key), "key": secret}, 201, {"cache-control": "no-store"})

    @router.post("/v1/tenants/{tenant_id}/keys")
    async def create_key(tenant_id: str, request: Request) -> Response:
        values = await read_object(request)
        return new_key_card(*await asyncio.to_thread(accounts.create_key, tenant_id, values, ADMIN))

    @router.get("/v1/keys")
    async def list_keys(tenant: str | None = None) -> Response:
        cards = [key_card(key) for key in accounts.keys(tenant)]
        return json_response({"object": "list", "data": cards})

    @router.patch("/v1/keys/{key_id}")
    async def update_key(key_id: str, request: Request) -> Response:
        changes = await read_object(request)
        key = await asyncio.to_thread(accounts.update_key, key_id, changes, ADMIN)
        return json_response(key_card(key))

    @router.post("/v1/keys/{key_id}/rotate")
    async def rotate_key(key_id: str, overlap: str = DEFAULT_OVERLAP) -> Response:
        """``overlap``: how long the old key still works; ``0s`` ends it at once."""
        try:
            seconds = 0.0 if overlap == "0s" else parse_duration(overlap)
        except ValueError as error:
            raise RequestError(f"overlap {error}", param="overlap") from None
        return new_key_card(*await asyncio.to_thread(accounts.rotate_key, key_id, seconds, ADMIN))

    @router.delete("/v1/keys/{key_id}")
    async def revoke_key(key_id: str) -> Response:
        await asyncio.to_thread(accounts.revoke_key, key_id, ADMIN)
        return json_response({"object": "key", "id": key_id, "revoked": True})

    return router
