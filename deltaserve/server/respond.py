"""Answers in OpenAI's shape, whole or streamed; the two APIs differ only in their ``Shape``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import Response

from deltaserve.server.errors import encode, json_response
from deltaserve.server.generate import Generation, Piece, join
from deltaserve.server.protocol import GenerationRequest
from deltaserve.server.requests import ServedModel
from deltaserve.server.sse import DONE, EventStream, event, while_connected
from deltaserve.server.turns import in_turn


class Shape(Protocol):
    """How an API names things."""

    kind: str
    chunk_kind: str

    def whole(self, piece: Piece) -> dict[str, Any]:
        """A finished choice; the piece is all of it."""
        ...

    def around(self, pieces: list[Piece]) -> dict[str, Any]:
        """What the answer says of its prompt, beside the choices. ``pieces``: the whole choices,
        or none when they are streamed."""
        ...

    def parts(self, piece: Piece, first: bool) -> Iterator[dict[str, Any]]:
        """The choices of the chunks that carry ``piece``; ``first`` of its choice or not."""
        ...


async def respond(
    request: Request,
    body: GenerationRequest,
    model: ServedModel,
    generation: Generation,
    shape: Shape,
    response_id: str,
) -> Response:
    """Follow a submitted generation to its end; it is aborted if the client leaves."""
    envelope = {
        "id": response_id,
        "object": shape.chunk_kind if body.stream else shape.kind,
        "created": int(time.time()),
        "model": model.info.name,
        "system_fingerprint": model.fingerprint,
    }
    if body.stream:
        events = _events(generation, shape, envelope, body)
        return EventStream(events, on_close=generation.abort)
    pieces = await collect(request, generation)
    about = {**envelope, "usage": generation.usage()}
    if body.num_logprobs is None and body.num_prompt_logprobs is None:
        return json_response(_whole(about, shape, pieces))
    # Seconds of work, when there are many: other tenants' answers go on meanwhile.
    work = in_turn(request, lambda: _whole(about, shape, pieces))
    return json_response(await while_connected(request.receive, work))


def _whole(about: dict[str, Any], shape: Shape, pieces: list[Piece]) -> bytes:
    return with_list(about | shape.around(pieces), "choices", map(shape.whole, pieces))


def with_list(about: dict[str, Any], name: str, items: Iterable[Any]) -> bytes:
    """``about`` and a list as JSON, item by item: nothing else runs while one is encoded."""
    listed = b", ".join(map(encode, items))
    return encode(about)[:-1] + b', "%b": [%b]}' % (name.encode(), listed)


async def collect(request: Request, generation: Generation) -> list[Piece]:
    """Each choice in one piece, in order; the generation is aborted if the client leaves."""
    try:
        pieces = await while_connected(request.receive, _joined(generation))
        await generation.settle()
    finally:
        generation.abort()
    return pieces


async def _joined(generation: Generation) -> list[Piece]:
    found: dict[int, list[Piece]] = {}
    async for piece in generation.pieces():
        found.setdefault(piece.index, []).append(piece)
    return [join(found[index]) for index in sorted(found)]


async def _events(
    generation: Generation, shape: Shape, envelope: dict[str, Any], body: GenerationRequest
) -> AsyncIterator[str]:
    # OpenAI: with include_usage every chunk has the field, null but in the last.
    extra: dict[str, Any] = {"usage": None} if body.include_usage else {}
    around = shape.around([])  # with the first chunk
    begun: set[int] = set()
    async for piece in generation.pieces():
        if body.continuous_usage:
            extra = {"usage": generation.usage()}
        for choice in shape.parts(piece, first=piece.index not in begun):
            yield event({**envelope, "choices": [choice], **extra, **around})
            around = {}
        begun.add(piece.index)
    if body.include_usage:
        yield event({**envelope, "choices": [], "usage": generation.usage()})
    await generation.settle()
    yield DONE
