"""The administrator's routes for tenants."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from deltaserve.server.auth import ADMIN
from deltaserve.server.errors import json_response
from deltaserve.server.reading import read_object
from deltaserve.tenancy.accounts import Accounts
from deltaserve.tenancy.limits import Limiter
from deltaserve.tenancy.tenants import Tenant


def tenants_router(accounts: Accounts, limiter: Limiter) -> APIRouter:
    router = APIRouter()

    def tenant_card(tenant: Tenant) -> dict[str, Any]:
        source = "file" if accounts.is_from_file(tenant) else "api"
        used = limiter.used(f"tenant {tenant.id}")
        shown = {"id": tenant.id, **tenant.model_dump(), "source": source, "used": used}
        return {"object": "tenant", **shown}

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

    return router
