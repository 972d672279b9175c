"""Bodies of requests: bounded in bytes and seconds, JSON, with the fields that they may have."""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar, cast

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from deltaserve.config import ServerConfig
from deltaserve.engine.grammar import check_grammar
from deltaserve.errors import RequestError
from deltaserve.server.errors import ApiError
from deltaserve.server.protocol import Body, BodyT, GenerationRequest, parse
from deltaserve.server.sse import ClientGoneError
from deltaserve.server.turns import in_turn

OtherT = TypeVar("OtherT", bound=Body)


async def read_request(request: Request, model: type[BodyT]) -> BodyT:
    """Read and check a body.

    Raises:
        RequestError: not JSON, too large, wrong fields, a grammar that is none.
        ClientGoneError: the client went away while it was sending.
    """
    body = parse(model, await _read_json(request))
    if isinstance(body, GenerationRequest) and (asked := body.grammar()) is not None:
        field, grammar = asked
        try:
            await in_turn(request, lambda: check_grammar(grammar))
        except RequestError as error:
            raise RequestError(f"{field}: {error}", param=field) from error
    return body


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object of a management request. Raises RequestError."""
    try:
        content = from_json(await _read_json(request), allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object")
    return content


async def read_either(
    request: Request, model: type[BodyT], other: type[OtherT], field: str
) -> BodyT | OtherT:
    """A body of one of two kinds: of the first, if it has ``field``."""
    body = await _read_json(request)
    try:
        content = from_json(body)
    except ValueError:
        content = None  # ``parse`` says what is wrong
    chosen: type[Any] = model if isinstance(content, dict) and field in content else other
    return cast("BodyT | OtherT", parse(chosen, body))


async def _read_json(request: Request) -> bytes:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps foreign web pages from posting unasked
        raise ApiError(415, "the body must be JSON, with 'Content-Type: application/json'")
    return await _read_body(request)


async def _read_body(request: Request) -> bytes:
    config: ServerConfig = request.app.state.config
    body, limit, seconds = bytearray(), config.max_body_bytes, config.request_timeout_s
    too_large = int(request.headers.get("content-length", 0)) > limit
    try:
        async with asyncio.timeout(seconds):
            if not too_large:
                async for chunk in request.stream():
                    body += chunk
                    if too_large := len(body) > limit:
                        break
    except ClientDisconnect:
        raise ClientGoneError from None
    except TimeoutError:
        raise ApiError(408, f"the body did not come within {seconds:g} s") from None
    if too_large:
        raise ApiError(413, f"the body is larger than {limit} bytes")
    request.state.body_bytes = len(body)
    return bytes(body)
