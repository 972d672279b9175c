"""The application: routes over an engine, inside the middleware."""

from __future__ import annotations

import time

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from deltaserve import __version__
from deltaserve.config import ServerConfig
from deltaserve.engine.client import EngineClient
from deltaserve.errors import DeltaServeError
from deltaserve.server.auth import SingleKey, TenantKeys, caller_of
from deltaserve.server.deltas import Deltas
from deltaserve.server.drain import Drain, DrainGate
from deltaserve.server.errors import GenerationError, error_response
from deltaserve.server.metrics import Metrics
from deltaserve.server.middleware import RequestContext
from deltaserve.server.office import Office
from deltaserve.server.openapi import add_schema
from deltaserve.server.requests import Service
from deltaserve.server.routes_adapters import adapters_router
from deltaserve.server.routes_audit import audit_router
from deltaserve.server.routes_chat import chat_router
from deltaserve.server.routes_completions import completions_router
from deltaserve.server.routes_console import console_router
from deltaserve.server.routes_deltas import deltas_router
from deltaserve.server.routes_embeddings import embeddings_router
from deltaserve.server.routes_health import health_router
from deltaserve.server.routes_keys import keys_router
from deltaserve.server.routes_models import models_router
from deltaserve.server.routes_tenants import tenants_router
from deltaserve.server.routes_tokenize import Aliases, tokenize_router
from deltaserve.server.routes_usage import metrics_router, usage_router
from deltaserve.server.tokenizers import Tokenizers
from deltaserve.server.traces import TraceRequests, Tracing
from deltaserve.server.turns import Turns


def create_app(
    client: EngineClient,
    tokenizers: Tokenizers,
    config: ServerConfig,
    drain: Drain | None = None,
    office: Office | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The endpoint. The caller starts and closes the engine and the office.

    Args:
        tokenizers: of the same models; others follow when they are asked for.
        drain: for who wants to end it without cutting answers off.
        office: of a configuration with tenants.
        tracing: where requests are traced.
    """
    assert (office is not None) == config.managed
    drain = drain or Drain()
    metrics = Metrics(client)
    app = FastAPI(
        title="DeltaServe", version=__version__, docs_url=None, redoc_url=None,
        redirect_slashes=False,
    )  # fmt: skip
    app.state.config = config
    app.state.turns = Turns()
    service = Service(client, tokenizers, config, metrics, office)
    _add_routes(app, service, drain)
    if office is not None:
        app.include_router(usage_router(office.usage, office.limiter))
        if config.admin_key_sha256 is not None:
            deltas = Deltas(client, office.registry, office.sources, tokenizers)
            _add_management(app, office, deltas)
    add_schema(app, locked=config.locked)
    _add_errors(app, metrics)
    app.add_middleware(DrainGate, drain=drain)
    if office is not None:
        app.add_middleware(
            TenantKeys, office=office, admin_sha256=config.admin_key_sha256, metrics=metrics
        )
    elif config.api_key_sha256 is not None:
        app.add_middleware(SingleKey, sha256=config.api_key_sha256)
    if tracing is not None:
        app.add_middleware(TraceRequests, tracing=tracing)
    app.add_middleware(RequestContext)
    app.add_middleware(Aliases)  # added last, so outermost
    return app


def _add_routes(app: FastAPI, service: Service, drain: Drain) -> None:
    """Those of every server."""
    app.include_router(models_router(service, int(time.time())))
    app.include_router(health_router(service.client, drain, service.config))
    app.include_router(completions_router(service))
    app.include_router(chat_router(service))
    app.include_router(embeddings_router(service))
    app.include_router(tokenize_router(service))
    app.include_router(metrics_router(service.metrics))
    app.include_router(console_router())


def _add_management(app: FastAPI, office: Office, deltas: Deltas) -> None:
    """The administrator's routes."""
    app.include_router(deltas_router(deltas, office.accounts))
    app.include_router(adapters_router(deltas, office.accounts))
    app.include_router(tenants_router(office.accounts, office.limiter))
    app.include_router(keys_router(office.accounts))
    app.include_router(audit_router(office.accounts))


def _add_errors(app: FastAPI, metrics: Metrics) -> None:
    async def on_error(request: Request, error: Exception) -> Response:
        caller = caller_of(request)
        metrics.refuse(error, caller.tenant.id if caller is not None else None)
        return error_response(error)

    for kind in (DeltaServeError, GenerationError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, on_error)
