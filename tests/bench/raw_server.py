"""A server that sends exactly the bytes it is told, for answers that no framework would give."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

Pieces = Sequence[bytes]
"""A whole HTTP answer as it is written, piece by piece; the connection is closed after it."""
Answer = Callable[[dict], Pieces]
"""Gets the request's body."""
GAP = 0.01
"""Seconds between pieces, so that each arrives on its own."""


def head(kind: str = "text/event-stream", *lines: str, status: str = "200 OK") -> bytes:
    """Of an answer that ends when its connection does."""
    fields = [f"HTTP/1.1 {status}", f"content-type: {kind}", "connection: close", *lines]
    return ("\r\n".join(fields) + "\r\n\r\n").encode()


def whole(body: bytes, kind: str = "application/json", *lines: str, status: str = "200 OK") -> list:
    return [head(kind, f"content-length: {len(body)}", *lines, status=status) + body]


MODELS = whole(b'{"object": "list", "data": [{"id": "strange"}]}')


class _Server:
    def __init__(self, answer: Answer, models: Pieces, others: Mapping[str, Pieces]) -> None:
        self._answer, self._models, self._others = answer, models, others

    async def meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            for number, piece in enumerate(await self._pieces(reader)):
                if number:
                    await asyncio.sleep(GAP)
                writer.write(piece)
                await writer.drain()
            writer.close()

    async def _pieces(self, reader: asyncio.StreamReader) -> Pieces:
        request = await reader.readexactly(1)
        if not request.isalpha():  # the hello of TLS
            return self._models
        request += await reader.readuntil(b"\r\n\r\n")
        lines = request.decode().lower().split("\r\n")
        if lines[0].startswith("get /v1/models"):
            return self._models
        if lines[0].startswith("get "):
            return self._others.get(lines[0].split()[1]) or whole(b"{}", status="404 Not Found")
        length = next(line for line in lines if line.startswith("content-length:"))
        return self._answer(json.loads(await reader.readexactly(int(length.split(":")[1]))))


@contextlib.contextmanager
def raw_server(
    answer: Answer, models: Pieces = MODELS, others: Mapping[str, Pieces] | None = None
) -> Iterator[str]:
    """Its address. models: what it says when asked for its models; others: for other paths."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    address: list[int] = []

    async def serve() -> None:
        server = await asyncio.start_server(
            _Server(answer, models, others or {}).meet, "127.0.0.1", 0
        )
        address.append(server.sockets[0].getsockname()[1])
        ready.set()

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.run_forever()
        late = asyncio.all_tasks(loop)
        for task in late:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*late, return_exceptions=True))
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield f"http://127.0.0.1:{address[0]}"
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
