"""``GET /openapi.json``: what the routes take and answer, for people and for tools.

Bodies are read by hand, so FastAPI does not know them; here they are added. There are no pages:
they would load scripts from elsewhere.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from deltaserve.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChat,
    TokenizeText,
)

BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "/v1/chat/completions": (ChatRequest,),
    "/v1/completions": (CompletionRequest,),
    "/v1/detokenize": (DetokenizeRequest,),
    "/v1/tokenize": (TokenizeText, TokenizeChat),
}
STREAMED = ("/v1/chat/completions", "/v1/completions")
REF = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def add_schema(app: FastAPI) -> None:
    """Let the application describe itself; called once all routes are there."""
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    models = sorted({model for kinds in BODIES.values() for model in kinds}, key=str)
    _, found = models_json_schema([(m, "validation") for m in models], ref_template=REF)
    schema["components"] = {"schemas": {**found["$defs"], "Error": ERROR}}
    for path, operations in schema["paths"].items():
        for method, operation in operations.items():
            body = BODIES.get(path) if method == "post" else None
            operation["responses"] = _responses(path, has_body=body is not None)
            if body is not None:
                operation["requestBody"] = _request_body(body)
    app.openapi = lambda: schema  # type: ignore[method-assign]


def _request_body(models: tuple[type[BaseModel], ...]) -> dict[str, Any]:
    refs = [{"$ref": REF.format(model=model.__name__)} for model in models]
    schema = refs[0] if len(refs) == 1 else {"anyOf": refs}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _responses(path: str, *, has_body: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if path in STREAMED:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    refused = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
    responses: dict[str, Any] = {"200": {"description": "Answer", "content": content}}
    if has_body:
        responses["400"] = {"description": "Refused: the message says why", "content": refused}
    responses["default"] = {"description": "Error", "content": refused}
    return responses
