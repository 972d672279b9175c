"""Traces of requests, by OpenTelemetry: a span for each HTTP request below ``/v1``, below it one
for each answer that the engine generated for it, and below that the phases of the engine's work.

A caller's ``traceparent`` header (W3C Trace Context) makes them part of his own trace. Prompts and
answers are in no span. Whether a trace is kept is decided by the caller, else by the SDK's own
variables (OTEL_TRACES_SAMPLER); headers for the collector stand in OTEL_EXPORTER_OTLP_HEADERS.
"""

from __future__ import annotations

import importlib
import os
import time
from contextvars import ContextVar
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltaserve import __version__
from deltaserve.engine.types import EngineRequest, FinishReason, RequestTiming
from deltaserve.errors import ConfigError
from deltaserve.server.auth import is_below

EXPORT_SECONDS = 5
"""Of one attempt to send; spans that a collector does not take are dropped, requests go on."""
PHASES = ("queued", "load", "prefill", "decode")
"""Fields of RequestTiming."""
current: ContextVar[RequestSpan | None] = ContextVar("request_span", default=None)
"""Of the request that is being handled; None where nothing is traced."""


class Tracing:
    """Makes spans and sends them from a thread of its own."""

    def __init__(self, exporter: Any) -> None:
        """exporter: an OpenTelemetry SpanExporter. Raises ConfigError: the SDK is missing."""
        sdk = _import("opentelemetry.sdk.trace")
        export = _import("opentelemetry.sdk.trace.export")
        resources = _import("opentelemetry.sdk.resources")
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "deltaserve"}
        self._provider = sdk.TracerProvider(resource=resources.Resource.create(named))
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self.trace = _import("opentelemetry.trace")
        self.tracer = self._provider.get_tracer("deltaserve", __version__)
        propagation = _import("opentelemetry.trace.propagation.tracecontext")
        self._propagator = propagation.TraceContextTextMapPropagator()

    def context(self, headers: Headers) -> Any:
        """The caller's, or a new one."""
        return self._propagator.extract(dict(headers))

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()


def open_tracing(endpoint: str | None) -> Tracing | None:
    """endpoint: where spans are sent by OTLP over HTTP; None for nowhere. Raises ConfigError."""
    if endpoint is None:
        return None
    otlp = _import("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    return Tracing(otlp.OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_SECONDS))


class TraceRequests:
    """ASGI middleware, inside RequestContext."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_below(scope["path"], ("/v1",)):
            await self._app(scope, receive, send)
            return
        span = RequestSpan(self._tracing, scope)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.status = message["status"]
            await send(message)

        token = current.set(span)
        try:
            await self._app(scope, receive, watched)
        finally:
            current.reset(token)
            span.end(scope)


class RequestSpan:
    """Of one HTTP request."""

    def __init__(self, tracing: Tracing, scope: Scope) -> None:
        self._tracing = tracing
        self._method: str = scope["method"]
        self._span = tracing.tracer.start_span(
            self._method,
            context=tracing.context(Headers(scope=scope)),
            kind=tracing.trace.SpanKind.SERVER,
            attributes={
                "http.request.method": self._method,
                "deltaserve.request_id": scope["state"]["request_id"],
            },
        )
        self.status = 0

    def answer(
        self,
        request: EngineRequest,
        began_ns: int,
        *,
        tokens: int,
        cached: int,
        reason: FinishReason | None,
        timing: RequestTiming | None,
    ) -> None:
        """A sequence has ended. began_ns: Unix time. reason: None if nobody waited for its end.
        timing: None if the engine was not asked to finish it, as after a stop string."""
        asked = request.sampling
        span = self._child(
            self._span, "generate", began_ns,
            {
                "gen_ai.request.model": request.model,
                "gen_ai.request.max_tokens": asked.max_tokens,
                "gen_ai.request.temperature": asked.temperature,
                "gen_ai.usage.input_tokens": len(request.prompt_ids),
                "gen_ai.usage.output_tokens": tokens,
                "gen_ai.response.finish_reasons": ["cancelled" if reason is None else reason.value],
                "deltaserve.cached_tokens": cached,
                "deltaserve.engine_request_id": request.request_id,
            },
        )  # fmt: skip
        if timing is not None:
            self._phases(span, timing, began_ns)
        span.end()

    def end(self, scope: Scope) -> None:
        route = getattr(scope.get("route"), "path", None)
        if route is not None:
            self._span.update_name(f"{self._method} {route}")
            self._span.set_attribute("http.route", route)
        caller = scope["state"].get("caller")
        if caller is not None:
            self._span.set_attribute("deltaserve.tenant", caller.tenant.id)
        if self.status:  # else the client has gone
            self._span.set_attribute("http.response.status_code", self.status)
        if self.status >= 500:
            self._span.set_status(self._tracing.trace.StatusCode.ERROR)
        self._span.end()

    def _phases(self, span: Any, timing: RequestTiming, start_ns: int) -> None:
        """One after the other: a preempted sequence returned to some, here they are sums."""
        for name in PHASES:
            nanoseconds = int(getattr(timing, name) * 1e9)
            if nanoseconds:
                self._child(span, name, start_ns, {}).end(start_ns + nanoseconds)
                start_ns += nanoseconds

    def _child(self, parent: Any, name: str, start_ns: int, attributes: dict[str, Any]) -> Any:
        context = self._tracing.trace.set_span_in_context(parent)
        tracer = self._tracing.tracer
        return tracer.start_span(name, context=context, start_time=start_ns, attributes=attributes)


def now_ns() -> int:
    """Unix time, which spans are in."""
    return time.time_ns()


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError("traces need OpenTelemetry: pip install 'deltaserve[otel]'") from error
