"""Publishing and removing a delta under vLLM's names, which call it a LoRA adapter."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from deltaserve.errors import RequestError
from deltaserve.server.deltas import Deltas
from deltaserve.server.reading import read_object
from deltaserve.server.routes_deltas import DeltaBody, Name, Path, note
from deltaserve.tenancy.accounts import Accounts
from deltaserve.tenancy.tenants import validate


class LoadAdapter(DeltaBody):
    lora_name: Name
    lora_path: Path
    load_inplace: bool = False


class UnloadAdapter(DeltaBody):
    lora_name: Name
    lora_int_id: int | None = None
    """Accepted because vLLM's clients send it; names are enough."""


def adapters_router(deltas: Deltas, accounts: Accounts) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/load_lora_adapter")
    async def load_adapter(request: Request) -> Response:
        body = validate(LoadAdapter, await read_object(request))
        if not body.load_inplace and body.lora_name in [d["name"] for d in await deltas.show_all()]:
            raise RequestError(
                f"{body.lora_name} has been loaded already: send load_inplace to replace it",
                param="lora_name",
            )
        shown = await deltas.publish(body.lora_name, body.lora_path)
        await note(accounts, "publish_delta", body.lora_name, shown)
        return Response(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter")
    async def unload_adapter(request: Request) -> Response:
        body = validate(UnloadAdapter, await read_object(request))
        await deltas.remove(body.lora_name)
        await note(accounts, "delete_delta", body.lora_name, None)
        return Response(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
