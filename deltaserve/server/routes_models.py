"""GET /v1/models and /v1/stats"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request, Response

from deltaserve.engine.types import ModelInfo
from deltaserve.server.errors import json_response
from deltaserve.server.requests import Service


def models_router(service: Service, created: int) -> APIRouter:
    """``created``: Unix time since which the models are served."""
    router = APIRouter()

    def card(info: ModelInfo) -> dict[str, Any]:
        return _card(info, created, service.client.max_model_len)

    @router.get("/v1/models")
    async def list_models(request: Request) -> Response:
        cards = [card(info) for info in service.models(request).values()]
        return json_response({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(request: Request, name: str) -> Response:
        return json_response(card(service.info(request, name)))

    @router.get("/v1/stats")
    async def stats() -> Response:
        """Load and counters of the engine. Under /v1, so that it is not open to strangers."""
        return json_response(asdict(service.client.stats()))

    return router


def _card(info: ModelInfo, created: int, max_model_len: int) -> dict[str, Any]:
    """OpenAI's model object, vLLM's ``parent`` and ``max_model_len``, and what a delta costs.

    ``root`` is the model at the root of the family. Paths of this machine are nobody's business.
    """
    return {
        "id": info.name,
        "object": "model",
        "created": created,
        "owned_by": "deltaserve",
        "root": info.parent or info.name,
        "parent": info.parent,
        "max_model_len": max_model_len,
        "state": info.state,
        "tier": info.tier,
        "version": info.version,
        "pinned": info.pinned,
        "digest": info.digest,
        "codecs": list(info.codecs),
        "merged": info.merged,
        "bytes": {
            "full": info.full_bytes,
            "resident": info.resident_bytes,
            "disk": info.disk_bytes,
        },
    }
