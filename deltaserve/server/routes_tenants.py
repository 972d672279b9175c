"""The administrator's routes for tenants, their keys, and the audit."""

from __future__ import annotations

import asyncio
import math
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from deltaserve.errors import RequestError
from deltaserve.server.auth import ADMIN
from deltaserve.server.errors import json_response
from deltaserve.server.reading import read_object
from deltaserve.tenancy import audit
from deltaserve.tenancy.accounts import Accounts
from deltaserve.tenancy.keys import Key
from deltaserve.tenancy.limits import Limiter
from deltaserve.tenancy.tenants import Tenant, parse_duration

DEFAULT_OVERLAP = "24h"
MAX_LINES = 1000
LineId = Annotated[int, Query(ge=1, le=2**62)]


def tenants_router(accounts: Accounts, limiter: Limiter) -> APIRouter:
    router = APIRouter()

    def tenant_card(tenant: Tenant) -> dict[str, Any]:
        source = "file" if accounts.is_from_file(tenant) else "api"
        used = limiter.used(f"tenant {tenant.id}")
        shown = {"id": tenant.id, **tenant.model_dump(), "source": source, "used": used}
        return {"object": "tenant", **shown}

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

    @router.get("/v1/tenants")
    async def list_tenants() -> Response:
        cards = [tenant_card(tenant) for tenant in accounts.tenants()]
        return json_response({"object": "list", "data": cards})

    @router.post("/v1/tenants")
    async def create_tenant(request: Request) -> Response:
        values = await read_object(request)
        tenant = await asyncio.to_thread(accounts.create_tenant, values, ADMIN)
        return json_response(tenant_card(tenant), 201)

    @router.get("/v1/tenants/{tenant_id}")
    async def retrieve_tenant(tenant_id: str) -> Response:
        return json_response(tenant_card(accounts.tenant(tenant_id)))

    @router.patch("/v1/tenants/{tenant_id}")
    async def update_tenant(tenant_id: str, request: Request) -> Response:
        changes = await read_object(request)
        tenant = await asyncio.to_thread(accounts.update_tenant, tenant_id, changes, ADMIN)
        return json_response(tenant_card(tenant))

    @router.delete("/v1/tenants/{tenant_id}")
    async def delete_tenant(tenant_id: str) -> Response:
        await asyncio.to_thread(accounts.delete_tenant, tenant_id, ADMIN)
        return json_response({"object": "tenant", "id": tenant_id, "deleted": True})

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

    @router.get("/v1/audit")
    async def read_audit(limit: int = 100, before: LineId | None = None) -> Response:
        """The latest changes first; ``before``: the id at which the last page ended."""
        if not 1 <= limit <= MAX_LINES:
            raise RequestError(f"limit must be from 1 to {MAX_LINES}", param="limit")
        lines = await asyncio.to_thread(audit.read, accounts.path, limit=limit, before_id=before)
        return json_response({"object": "list", "data": lines})

    return router
