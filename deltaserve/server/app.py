"""The application: routes over an engine, inside the middleware."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from deltaserve import __version__
from deltaserve.config import ServerConfig
from deltaserve.engine.client import EngineClient
from deltaserve.errors import DeltaServeError
from deltaserve.server.drain import Drain, DrainGate
from deltaserve.server.errors import GenerationError, error_response
from deltaserve.server.middleware import ApiKey, RequestContext
from deltaserve.server.openapi import add_schema
from deltaserve.server.requests import Service
from deltaserve.server.routes_chat import chat_router
from deltaserve.server.routes_completions import completions_router
from deltaserve.server.routes_embeddings import embeddings_router
from deltaserve.server.routes_health import health_router
from deltaserve.server.routes_models import models_router
from deltaserve.server.routes_tokenize import Aliases, tokenize_router
from deltaserve.server.tokenizers import Tokenizers


def create_app(
    client: EngineClient,
    tokenizers: Tokenizers,
    config: ServerConfig,
    drain: Drain | None = None,
) -> FastAPI:
    """The endpoint. The caller starts and closes the engine.

    Args:
        tokenizers: of the same models; others follow when they are asked for.
        drain: for who wants to end it without cutting answers off.
    """
    drain = drain or Drain()
    app = FastAPI(
        title="DeltaServe", version=__version__, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.config = config
    service = Service(client, tokenizers, config)
    app.include_router(models_router(service, int(time.time())))
    app.include_router(health_router(client, drain))
    app.include_router(completions_router(service))
    app.include_router(chat_router(service))
    app.include_router(embeddings_router(service))
    app.include_router(tokenize_router(service))
    add_schema(app)
    for kind in (DeltaServeError, GenerationError, HTTPException):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(DrainGate, drain=drain)
    if config.api_key_sha256 is not None:
        app.add_middleware(ApiKey, sha256=config.api_key_sha256)
    app.add_middleware(RequestContext)
    app.add_middleware(Aliases)  # added last, so outermost
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    return error_response(error)
