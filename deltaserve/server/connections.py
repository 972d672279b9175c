"""Connections that take and give nothing: they end, so that nobody can hoard them.

uvicorn limits neither the time nor the bytes of a request's head, and the kernel waits for hours
for a peer that has vanished or does not read. Bodies and answers have limits of their own
(``requests``, ``generate``).
"""

from __future__ import annotations

import asyncio
import json
import resource
import socket
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from deltaserve.server.errors import ApiError, describe

HEAD_SECONDS = 10.0
"""From the opening of a connection, or the first byte of a further request, to the end of its
headers. A connection that is kept for further requests is closed by uvicorn after 5 idle ones."""
MAX_HEAD_BYTES = 64 * 1024
SILENT_SECONDS = 60
"""After which a peer that takes no data, or does not answer the kernel's probes, has gone."""
REASONS = {400: b"Bad Request", 408: b"Request Timeout", 431: b"Request Header Fields Too Large"}


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's, with limits for what comes before a request is known."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._in_head = True
        self._head_timer: asyncio.TimerHandle | None = None
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the headers are larger than {MAX_HEAD_BYTES} bytes")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        if not self._in_head:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._end_head()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "this is not HTTP")

    def _await_head(self) -> None:
        self._in_head = True
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._on_head_timeout)

    def _end_head(self) -> None:
        self._in_head = False
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _on_head_timeout(self) -> None:
        # What said nothing at all gets no answer, as with a connection that was kept open.
        if self._head_bytes:
            self._refuse(408, f"the headers did not come within {HEAD_SECONDS:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """OpenAI's shape even here; then the connection ends."""
        self._end_head()
        if self.cycle is None or self.cycle.response_complete:  # else it would fall into an answer
            self.transport.write(_refusal(status, message))
        self.transport.close()


def _refusal(status: int, message: str) -> bytes:
    body = json.dumps(describe(ApiError(status, message))[1]).encode()
    head = b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\n" % (status, REASONS[status])
    return head + b"content-length: %d\r\nconnection: close\r\n\r\n" % len(body) + body


def end_silent_peers(listener: socket.socket) -> None:
    """Set on the listener what its connections inherit (Linux; others keep their defaults)."""
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options: dict[str, Any] = {
        "TCP_KEEPIDLE": SILENT_SECONDS // 2,
        "TCP_KEEPINTVL": SILENT_SECONDS // 6,
        "TCP_KEEPCNT": 3,
        "TCP_USER_TIMEOUT": SILENT_SECONDS * 1000,  # also of one who is there, but reads nothing
    }
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:
            listener.setsockopt(socket.IPPROTO_TCP, option, value)


def allow_many_descriptors() -> None:
    """A connection is a descriptor, and the usual soft limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
