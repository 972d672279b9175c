"""The administrator's routes for deltas; under vLLM's names they are in ``routes_adapters``."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from deltaserve.errors import RequestError
from deltaserve.server.auth import ADMIN
from deltaserve.server.deltas import Deltas
from deltaserve.server.errors import json_response
from deltaserve.server.reading import read_object
from deltaserve.tenancy.accounts import Accounts
from deltaserve.tenancy.tenants import validate

Name = Annotated[str, Field(min_length=1, max_length=128)]
Path = Annotated[str, Field(min_length=1, max_length=4096)]


class DeltaBody(BaseModel):
    """What is sent to a route of deltas: no conversions, no field ignored."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Publish(DeltaBody):
    name: Name
    path: Path | None = None
    """A directory in one of the roots, hf://OWNER/NAME@REVISION, or an address of an object store
    or a web server below one of the delta_urls."""
    version: Annotated[int, Field(ge=1)] | None = None
    """A version that is registered already."""
    digest: str | None = None
    pinned: bool | None = None


class Change(DeltaBody):
    pinned: bool


class Rollback(DeltaBody):
    version: Annotated[int, Field(ge=1)] | None = None


def deltas_router(deltas: Deltas, accounts: Accounts) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/deltas")
    async def list_deltas() -> Response:
        return json_response({"object": "list", "data": await deltas.show_all()})

    @router.get("/v1/deltas/{name:path}")
    async def retrieve_delta(name: str) -> Response:
        return json_response(await deltas.show(name))

    @router.post("/v1/deltas")
    async def publish_delta(request: Request) -> Response:
        body = validate(Publish, await read_object(request))
        shown = await _publish(deltas, body)
        await note(accounts, "publish_delta", body.name, shown)
        return json_response(shown)

    @router.post("/v1/deltas/{name:path}/rollback")
    async def roll_back_delta(name: str, request: Request) -> Response:
        body = validate(Rollback, await read_object(request))
        if body.version is None:
            shown = await deltas.roll_back(name)
        else:
            shown = await deltas.activate(name, body.version)
        await note(accounts, "roll_back_delta", name, shown)
        return json_response(shown)

    @router.patch("/v1/deltas/{name:path}")
    async def change_delta(name: str, request: Request) -> Response:
        body = validate(Change, await read_object(request))
        shown = await deltas.pin(name, body.pinned)
        await note(accounts, "change_delta", name, shown)
        return json_response(shown)

    @router.delete("/v1/deltas/{name:path}")
    async def delete_delta(name: str, version: int | None = None) -> Response:
        """Without a version: the whole delta. Returns when its memory is free."""
        if version is not None:
            shown = await deltas.remove_version(name, version)
            await note(accounts, f"delete_version {version}", name, shown)
            return json_response(shown)
        await deltas.remove(name)
        await note(accounts, "delete_delta", name, None)
        return json_response({"object": "delta", "name": name, "deleted": True})

    return router


async def note(accounts: Accounts, action: str, name: str, after: dict[str, Any] | None) -> None:
    """Put a change of a delta into the audit. after: the delta as it is shown now, None if it is
    gone."""
    kept = after and {key: after[key] for key in ("version", "pinned")}
    await asyncio.to_thread(accounts.note, ADMIN, action, f"delta/{name}", None, kept)


async def _publish(deltas: Deltas, body: Publish) -> dict[str, Any]:
    if (body.path is None) == (body.version is None):
        raise RequestError("give either path or version", param="path")
    if body.path is not None:
        return await deltas.publish(body.name, body.path, digest=body.digest, pinned=body.pinned)
    assert body.version is not None
    if body.digest is not None:
        raise RequestError("digest goes with path; a version has its own", param="digest")
    return await deltas.activate(body.name, body.version, pinned=body.pinned)
