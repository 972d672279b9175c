"""GET /v1/models and /v1/stats"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response

from deltaserve.server.errors import json_response
from deltaserve.server.requests import ServedModel, Service


def models_router(service: Service, created: int) -> APIRouter:
    """``created``: Unix time since which the models are served."""
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> Response:
        cards = [_card(model, created) for model in service.models.values()]
        return json_response({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}")
    async def retrieve_model(name: str) -> Response:
        return json_response(_card(service.model(name), created))

    @router.get("/v1/stats")
    async def stats() -> Response:
        """Load and counters of the engine. Under /v1, so that it is not open to strangers."""
        return json_response(asdict(service.client.stats()))

    return router


def _card(model: ServedModel, created: int) -> dict[str, Any]:
    """OpenAI's model object, vLLM's ``parent`` and ``max_model_len``, and what a delta costs.

    ``root`` is the model at the root of the family. Paths of this machine are nobody's business.
    """
    info = model.info
    return {
        "id": info.name,
        "object": "model",
        "created": created,
        "owned_by": "deltaserve",
        "root": info.parent or info.name,
        "parent": info.parent,
        "max_model_len": model.max_model_len,
        "digest": info.digest,
        "codecs": list(info.codecs),
        "merged": info.merged,
        "bytes": {
            "full": info.full_bytes,
            "resident": info.resident_bytes,
            "disk": info.disk_bytes,
        },
    }
