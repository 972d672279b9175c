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

from deltaserve.server.auth import is_guarded
from deltaserve.server.bodies import DetokenizeRequest, EmbeddingRequest, TokenizeChat, TokenizeText
from deltaserve.server.protocol import ChatRequest, CompletionRequest
from deltaserve.server.routes_adapters import LoadAdapter, UnloadAdapter
from deltaserve.server.routes_deltas import Change, Publish, Rollback
from deltaserve.tenancy.tenants import KeySettings, NewKey, Tenant

BODIES: dict[str, tuple[type[BaseModel], ...]] = {
    "post /v1/chat/completions": (ChatRequest,),
    "post /v1/completions": (CompletionRequest,),
    "post /v1/detokenize": (DetokenizeRequest,),
    "post /v1/embeddings": (EmbeddingRequest,),
    "post /v1/tokenize": (TokenizeText, TokenizeChat),
    "post /v1/deltas": (Publish,),
    "patch /v1/deltas/{name}": (Change,),
    "post /v1/deltas/{name}/rollback": (Rollback,),
    "post /v1/load_lora_adapter": (LoadAdapter,),
    "post /v1/unload_lora_adapter": (UnloadAdapter,),
    "post /v1/tenants": (Tenant,),
    "patch /v1/tenants/{tenant_id}": (Tenant,),
    "post /v1/tenants/{tenant_id}/keys": (NewKey,),
    "patch /v1/keys/{key_id}": (KeySettings,),
}
PARTIAL = {"patch /v1/tenants/{tenant_id}": "id"}
"""Any of the body's fields may come, but for this one: it stands in the address."""
CREATED = (
    "post /v1/tenants", "post /v1/tenants/{tenant_id}/keys", "post /v1/keys/{key_id}/rotate",
)  # fmt: skip
JSON, TEXT = "application/json", "text/plain"
ANSWERS: dict[str, tuple[str, ...]] = {
    "post /v1/chat/completions": (JSON, "text/event-stream"),
    "post /v1/completions": (JSON, "text/event-stream"),
    "get /v1/usage": (JSON, "text/csv"),
    "post /v1/load_lora_adapter": (TEXT,),
    "post /v1/unload_lora_adapter": (TEXT,),
    "get /metrics": (TEXT,),
}
"""Kinds of answers, where they are not just JSON."""
REFUSALS = {
    "400": "The address or the body is wrong: the message says how",
    "401": "No key, or a wrong one",
    "403": "Not with this key",
    "404": "There is no such model, tenant, key or delta",
    "408": "The body did not come in time",
    "409": "It contradicts what is there",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "A limit is reached: retry-after says for how long",
    "500": "The engine failed on this request",
    "503": "The server starts, stops, or cannot serve this now",
    "504": "The answer was not complete in time",
}
"""Beyond these no route answers with an error."""
OF_BODIES = ("408", "413", "415", "500", "504")
OF_KEYS = ("401", "403", "409")
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


def add_schema(app: FastAPI, *, locked: bool) -> None:
    """Let the application describe itself; called once all routes are there.

    locked: keys are asked for.
    """
    schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
    operations = {
        f"{method} {path}": operation
        for path, methods in schema["paths"].items()
        for method, operation in methods.items()
    }
    kinds = {kind for name in operations for kind in BODIES.get(name, ())}
    models = [(kind, "validation") for kind in sorted(kinds, key=str)]
    _, found = models_json_schema(models, ref_template=REF)  # type: ignore[arg-type]
    schemas = {**found["$defs"], "Error": ERROR}
    schema["components"] = {"schemas": schemas}
    if locked:
        schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for name, operation in operations.items():
        body = _body(name, schemas)
        guarded = locked and is_guarded(name.partition(" ")[2])
        operation["responses"] = _responses(name, body is not None, guarded)
        if body is not None:
            operation["requestBody"] = {"required": True, "content": {JSON: {"schema": body}}}
        if guarded:
            operation["security"] = [{"key": []}]
    app.openapi = lambda: schema  # type: ignore[method-assign]


def _body(name: str, schemas: dict[str, Any]) -> dict[str, Any] | None:
    kinds = [kind.__name__ for kind in BODIES.get(name, ())]
    if not kinds:
        return None
    if name in PARTIAL:
        whole = schemas[kinds[0]]
        fields = {key: of for key, of in whole["properties"].items() if key != PARTIAL[name]}
        return {key: of for key, of in whole.items() if key != "required"} | {"properties": fields}
    refs = [{"$ref": REF.format(model=kind)} for kind in kinds]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}


def _responses(name: str, has_body: bool, guarded: bool) -> dict[str, Any]:
    kinds = {kind: "object" if kind == JSON else "string" for kind in ANSWERS.get(name, (JSON,))}
    content = {kind: {"schema": {"type": type_}} for kind, type_ in kinds.items()}
    refused = {JSON: {"schema": {"$ref": REF.format(model="Error")}}}
    status = "201" if name in CREATED else "200"
    responses: dict[str, Any] = {status: {"description": "Answer", "content": content}}
    left_out = set() if has_body else {*OF_BODIES}
    left_out |= set() if guarded else {*OF_KEYS}
    left_out |= set() if guarded or has_body else {"429"}
    for code, meaning in REFUSALS.items():
        if code not in left_out:
            responses[code] = {"description": meaning, "content": refused}
    return responses
