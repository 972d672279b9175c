"""The administrator's routes for deltas, and vLLM's names for two of them."""

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


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Publish(_Body):
    name: Name
    path: Path | None = None
    """A directory in one of the roots, hf://OWNER/NAME@REVISION, or an address of an object store
    or a web server below one of the delta_urls."""
    version: Annotated[int, Field(ge=1)] | None = None
    """A version that is registered already."""
    digest: str | None = None
    pinned: bool | None = None


class Change(_Body):
    pinned: bool


class Rollback(_Body):
    version: Annotated[int, Field(ge=1)] | None = None


class LoadAdapter(_Body):
    lora_name: Name
    lora_path: Path
    load_inplace: bool = False


class UnloadAdapter(_Body):
    lora_name: Name
    lora_int_id: int | None = None
    """Accepted because vLLM's clients send it; names are enough."""


def deltas_router(deltas: Deltas, accounts: Accounts) -> APIRouter:
    router = APIRouter()

    async def note(action: str, name: str, after: dict[str, Any] | None) -> None:
        kept = after and {key: after[key] for key in ("version", "pinned")}
        await asyncio.to_thread(accounts.note, ADMIN, action, f"delta/{name}", None, kept)

    @router.get("/v1/deltas")
    async def list_deltas() -> Response:
        return json_response({"object": "list", "data": await deltas.show_all()})

    @router.get("/v1/deltas/{name:path}")
    async def retrieve_delta(name: str) -> Response:
        return json_response(await deltas.show(name))

    @router.post("/v1/deltas")
    async def publish_delta(request: Request) -> Response:
        body = validate(Publish, await read_object(request))
        if (body.path is None) == (body.version is None):
            raise RequestError("give either path or version", param="path")
        if body.path is not None:
            shown = await deltas.publish(
                body.name, body.path, digest=body.digest, pinned=body.pinned
            )
        else:
            assert body.version is not None
            if body.digest is not None:
                raise RequestError("digest goes with path; a version has its own", param="digest")
            shown = await deltas.activate(body.name, body.version, pinned=body.pinned)
        await note("publish_delta", body.name, shown)
        return json_response(shown)

    @router.post("/v1/deltas/{name:path}/rollback")
    async def roll_back_delta(name: str, request: Request) -> Response:
        body = validate(Rollback, await read_object(request))
        if body.version is None:
            shown = await deltas.roll_back(name)
        else:
            shown = await deltas.activate(name, body.version)
        await note("roll_back_delta", name, shown)
        return json_response(shown)

    @router.patch("/v1/deltas/{name:path}")
    async def change_delta(name: str, request: Request) -> Response:
        body = validate(Change, await read_object(request))
        shown = await deltas.pin(name, body.pinned)
        await note("change_delta", name, shown)
        return json_response(shown)

    @router.delete("/v1/deltas/{name:path}")
    async def delete_delta(name: str, version: int | None = None) -> Response:
        """Without a version: the whole delta. Returns when its memory is free."""
        if version is not None:
            shown = await deltas.remove_version(name, version)
            await note(f"delete_version {version}", name, shown)
            return json_response(shown)
        await deltas.remove(name)
        await note("delete_delta", name, None)
        return json_response({"object": "delta", "name": name, "deleted": True})

    @router.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request) -> Response:
        body = validate(LoadAdapter, await read_object(request))
        if not body.load_inplace and body.lora_name in [d["name"] for d in await deltas.show_all()]:
            raise RequestError(
                f"{body.lora_name} has been loaded already: send load_inplace to replace it",
                param="lora_name",
            )
        shown = await deltas.publish(body.lora_name, body.lora_path)
        await note("publish_delta", body.lora_name, shown)
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request) -> Response:
        body = validate(UnloadAdapter, await read_object(request))
        await deltas.remove(body.lora_name)
        await note("delete_delta", body.lora_name, None)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
