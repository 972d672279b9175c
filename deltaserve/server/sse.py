"""Server-sent events, and work that ends as soon as its client has gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from deltaserve.server.errors import describe

T = TypeVar("T")

DONE = "data: [DONE]\n\n"


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads an answer."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run ``work``, but cancel it when the client disconnects.

    The request's body must have been read. Waiting for the ``http.disconnect`` message is
    prompt even while the work is silent; asking ``is_disconnected`` now and then is not.

    Raises:
        ClientGoneError: the client went first.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: Any) -> str:
    # ASCII: some clients take U+2028 and the like for the end of a line.
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


class EventStream(Response):
    """Sends events as they come. A failure midway becomes a last event with the error."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], on_close: Callable[[], None]) -> None:
        """``on_close`` is called exactly when the response is over, however it ended."""
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        finally:
            self._on_close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for text in self._events:
                await _send_body(send, text, more=True)
        except Exception as error:
            _, body = describe(error)
            await _send_body(send, event(body), more=True)
        await _send_body(send, "", more=False)


async def _send_body(send: Send, text: str, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
