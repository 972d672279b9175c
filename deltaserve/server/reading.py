"""Bodies of requests: bounded in bytes and seconds, JSON, with the fields that they may have."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, TypeVar, cast

from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from deltaserve.config import ServerConfig
from deltaserve.engine.grammar import check_grammar
from deltaserve.engine.types import Grammar
from deltaserve.errors import RequestError
from deltaserve.server.auth import ticket_of
from deltaserve.server.errors import ApiError
from deltaserve.server.grammars import MAX_GRAMMAR_LENGTH
from deltaserve.server.protocol import Body, BodyT, GenerationRequest, parse
from deltaserve.server.sse import ClientGoneError, while_connected
from deltaserve.server.turns import LARGE_BYTES, in_turn

T = TypeVar("T")
OtherT = TypeVar("OtherT", bound=Body)

MAX_NODES = LARGE_BYTES
"""Lists, objects and members of objects in a body. Reading one takes far longer than its bytes
tell, and nothing else runs meanwhile, in whatever thread it is done."""
NODE = re.compile(rb'([\[{:])|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
"""A node, or a text: what stands in there is none. Never goes back, so it takes linear time."""


async def read_request(request: Request, model: type[BodyT]) -> BodyT:
    """Read and check a body.

    Raises:
        RequestError: not JSON, too large, wrong fields, a grammar that is none.
        LimitError: too much of the tenant's is being read.
        ClientGoneError: the client went away while it was sending.
    """

    def read(content: bytes) -> tuple[BodyT, tuple[str, Grammar] | None]:
        found = parse(model, content)
        return found, usable_grammar(found) if isinstance(found, GenerationRequest) else None

    body, asked = await _read_json(request, read)
    if asked is not None:
        field, grammar = asked
        try:
            await in_turn(request, lambda: check_grammar(grammar))
        except RequestError as error:
            raise RequestError(f"{field}: {error}", param=field) from error
    return body


def usable_grammar(body: GenerationRequest) -> tuple[str, Grammar] | None:
    """``body.grammar()``, if it is not too long. Raises RequestError."""
    asked = body.grammar()
    if asked is not None and len(asked[1].text) > MAX_GRAMMAR_LENGTH:
        raise RequestError(
            f"{asked[0]} is longer than {MAX_GRAMMAR_LENGTH} characters as text", param=asked[0]
        )
    return asked


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object of a management request. Raises RequestError."""
    return await _read_json(request, _object)


async def read_either(
    request: Request, model: type[BodyT], other: type[OtherT], field: str
) -> BodyT | OtherT:
    """A body of one of two kinds: of the first, if it has ``field``."""

    def parse_either(body: bytes) -> BodyT | OtherT:
        try:
            content = from_json(body)
        except ValueError:
            content = None  # ``parse`` says what is wrong
        chosen: type[Any] = model if isinstance(content, dict) and field in content else other
        return cast("BodyT | OtherT", parse(chosen, body))

    return await _read_json(request, parse_either)


def _object(body: bytes) -> dict[str, Any]:
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise RequestError(f"the body is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise RequestError("the body must be a JSON object")
    return content


async def _read_json(request: Request, parse_body: Callable[[bytes], T]) -> T:
    """What ``parse_body`` makes of the body; of a large one in the tenant's turn."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # also keeps foreign web pages from posting unasked
        raise ApiError(415, "the body must be JSON, with 'Content-Type: application/json'")
    body = await _read_body(request)
    if len(body) <= LARGE_BYTES:
        return parse_body(body)

    def work() -> T:
        check_nodes(body)
        return parse_body(body)

    return await while_connected(request.receive, in_turn(request, work))


def check_nodes(body: bytes) -> None:
    """Raises RequestError for JSON of too many parts."""
    if sum(body.count(mark) for mark in (b"[", b"{", b":")) <= MAX_NODES:
        return
    nodes = 0
    for found in NODE.finditer(body):
        nodes += found.lastindex is not None
        if nodes > MAX_NODES:
            raise RequestError(
                f"the body holds more than {MAX_NODES} lists, objects and members of objects: "
                "send several requests"
            )


async def _read_body(request: Request) -> bytes:
    config: ServerConfig = request.app.state.config
    body, limit, seconds = bytearray(), config.max_body_bytes, config.request_timeout_s
    ticket = ticket_of(request)
    too_large = int(request.headers.get("content-length", 0)) > limit
    try:
        async with asyncio.timeout(seconds):
            if not too_large:
                async for chunk in request.stream():
                    if ticket is not None:
                        ticket.hold(len(chunk))
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
