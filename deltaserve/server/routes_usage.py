"""GET /v1/usage: sums by day, tenant, key and model, as JSON or CSV; GET /v1/key: what the caller
may use, and how much of it is used; and GET /metrics."""

from __future__ import annotations

import asyncio
import csv
import io
import math
from datetime import date
from typing import Any

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from deltaserve.errors import RequestError
from deltaserve.server.auth import caller_of
from deltaserve.server.errors import json_response
from deltaserve.server.metrics import Metrics
from deltaserve.tenancy.limits import Limiter, Subject
from deltaserve.tenancy.usage import SUMS, UsageLog, usage_sums

DEFAULT_GROUPS = "day,tenant,model"
SHOWN_LIMITS = {
    "models", "rpm_limit", "tpm_limit", "max_parallel_requests", "daily_token_budget",
    "monthly_token_budget",
}  # fmt: skip
"""What concerns the tenant itself; how it stands beside others is the administrator's."""


def usage_router(usage: UsageLog, limiter: Limiter) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/usage")
    async def read_usage(
        request: Request,
        group_by: str = DEFAULT_GROUPS,
        first_day: str = "0001-01-01",
        last_day: str = "9999-12-31",
        tenant: str | None = None,
        key: str | None = None,
        model: str | None = None,
        format: str = "json",
    ) -> Response:
        """Days are UTC's, both ends included. A tenant sees what is its own."""
        for name, day in (("first_day", first_day), ("last_day", last_day)):
            _check_day(name, day)
        if format not in ("json", "csv"):
            raise RequestError("format must be json or csv", param="format")
        caller = caller_of(request)
        if caller is not None:
            tenant = caller.tenant.id
        wanted = {"tenant": tenant, "key": key, "model": model}
        where = {name: value for name, value in wanted.items() if value is not None}
        groups = [name for name in group_by.split(",") if name]
        rows = await asyncio.to_thread(
            usage_sums, usage.path, groups, first_day=first_day, last_day=last_day, where=where
        )
        if format == "csv":
            return _csv([*groups, *SUMS], rows)
        return json_response({"object": "list", "data": rows})

    @router.get("/v1/key")
    async def read_key(request: Request) -> Response:
        """Whose key this is, and what is left of its limits; the administrator has none."""
        caller = caller_of(request)
        if caller is None:
            return json_response({"object": "key", "kind": "admin"})
        key = caller.key
        tenant_limits, key_limits = (_limits(s, limiter) for s in caller.subjects)
        shown = {
            "id": key.id,
            "key_alias": key.settings.key_alias,
            "expires": None if math.isinf(key.expires) else int(key.expires),
            **key_limits,
            "tenant": {"id": caller.tenant.id, **tenant_limits},
        }
        return json_response({"object": "key", "kind": "tenant", **shown})

    return router


def _limits(subject: Subject, limiter: Limiter) -> dict[str, Any]:
    shown = subject.limits.model_dump(include=SHOWN_LIMITS)
    return {**shown, "used": limiter.used(subject.name)}


def metrics_router(metrics: Metrics) -> APIRouter:
    router = APIRouter()

    @router.get("/metrics")
    async def read_metrics() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return router


def _check_day(name: str, day: str) -> None:
    try:
        proper = date.fromisoformat(day).isoformat() == day
    except ValueError:
        proper = False
    if not proper:
        raise RequestError(f"{name} must be a day such as 2030-01-31", param=name)


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> Response:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    headers = {"content-disposition": 'attachment; filename="usage.csv"'}
    return Response(text.getvalue(), headers=headers, media_type="text/csv")
