"""GET /health, /ready and /version: for orchestrators and load balancers, without a key"""

from __future__ import annotations

from fastapi import APIRouter, Response

from deltaserve import __version__
from deltaserve.config import ServerConfig
from deltaserve.engine.client import EngineClient
from deltaserve.errors import EngineDeadError
from deltaserve.server.drain import DRAINING, Drain
from deltaserve.server.errors import ApiError, json_response


def health_router(client: EngineClient, drain: Drain, config: ServerConfig) -> APIRouter:
    router = APIRouter()
    keys = "tenants" if config.managed else "one" if config.locked else "none"

    @router.get("/health")
    async def health() -> Response:
        """503 means: restart this server. It recovers on its own from an engine that crashed."""
        if client.alive():
            return json_response({"status": "ok"})
        if client.recovering():
            return json_response({"status": "recovering"})
        raise EngineDeadError("the engine has stopped: restart the server")

    @router.get("/ready")
    async def ready() -> Response:
        """503 means: send no requests for now."""
        if drain.begun:
            raise ApiError(503, DRAINING, code="draining")
        if not client.alive():
            raise EngineDeadError("the engine is down")
        return json_response({"status": "ready"})

    @router.get("/version")
    async def version() -> Response:
        """``keys``: whether one is needed, so that clients need not try."""
        return json_response({"version": __version__, "keys": keys})

    return router
