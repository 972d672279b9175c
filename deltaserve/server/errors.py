"""Every failure as OpenAI's clients expect it: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from deltaserve.errors import (
    AccountingError,
    AuthenticationError,
    ConflictError,
    EngineDeadError,
    ForbiddenError,
    LimitError,
    NotFoundError,
    QueueFullError,
    RequestError,
    UnknownModelError,
)

logger = logging.getLogger("deltaserve.server")

INTERNAL_MESSAGE = "The server failed to handle this request; its log says more."


class ApiError(RequestError):
    """A refusal with its own status or code."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code


class GenerationError(Exception):
    """The engine gave up on a request that was fine (HTTP 500)."""


def describe(error: Exception) -> tuple[int, dict[str, Any]]:
    """The status and the body for any exception; what was not foreseen is logged, not shown."""
    match error:
        case ApiError():
            return error.status, _body(str(error), error.status, error.param, error.code)
        case UnknownModelError():
            return 404, _body(str(error), 404, error.param or "model", "model_not_found")
        case QueueFullError():
            return 429, _body(str(error), 429, error.param, "rate_limit_exceeded")
        case LimitError():
            # OpenAI's words: a budget is not refilled soon.
            code = "insufficient_quota" if "budget" in error.limit else "rate_limit_exceeded"
            return 429, _body(str(error), 429, code=code)
        case AuthenticationError():
            return 401, _body(str(error), 401, code="invalid_api_key")
        case ForbiddenError():
            return 403, _body(str(error), 403)
        case NotFoundError():
            return 404, _body(str(error), 404, error.param)
        case ConflictError():
            return 409, _body(str(error), 409, error.param)
        case AccountingError():
            return 503, _body(str(error), 503)
        case RequestError():
            return 400, _body(str(error), 400, error.param)
        case EngineDeadError():
            return 503, _body(str(error), 503, code="engine_dead")
        case GenerationError():
            return 500, _body(str(error), 500)
        case RequestValidationError():  # of what stands in the address
            first = error.errors()[0]
            return 400, _body(f"{first['loc'][-1]}: {first['msg']}", 400, str(first["loc"][-1]))
        case HTTPException():
            return error.status_code, _body(str(error.detail), error.status_code)
    logger.error("unexpected error", exc_info=error)
    return 500, _body(INTERNAL_MESSAGE, 500)


def error_response(error: Exception) -> Response:
    status, body = describe(error)
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    if isinstance(error, QueueFullError):
        headers["retry-after"] = str(error.retry_after_s)
    if isinstance(error, LimitError):
        if math.isinf(error.retry_after_s):
            headers["x-should-retry"] = "false"  # OpenAI's clients obey it
        else:
            headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(body, status, headers)


def json_response(
    content: Any, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """``content`` as JSON; bytes are that already."""
    body = content if isinstance(content, bytes) else encode(content)
    return Response(body, status, headers, media_type="application/json")


def encode(content: Any) -> bytes:
    """JSON in ASCII, so that no text, however odd, can fail to be encoded."""
    return json.dumps(content).encode()


def _body(
    message: str, status: int, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    kinds = {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
    }
    kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
