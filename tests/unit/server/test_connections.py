"""Connections that take and give nothing, and what is told while the models are loaded."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
from serving import running
from starlette.responses import PlainTextResponse

from deltaserve import logs
from deltaserve.server import connections
from deltaserve.server.connections import GuardedProtocol, end_silent_peers
from deltaserve.server.waiting_room import waiting_room


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.3)
    with running(PlainTextResponse("hello"), http=GuardedProtocol) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        yield host, int(port)


def answer(connection: socket.socket) -> bytes:
    """All that comes until the server ends the connection."""
    connection.settimeout(5)
    return b"".join(iter(lambda: connection.recv(65536), b""))


def error_in(raw: bytes) -> tuple[int, dict]:
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)["error"]


def test_a_connection_that_says_nothing_is_closed(address):
    with socket.create_connection(address) as connection:
        assert answer(connection) == b""


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_headers_that_do_not_end_are_not_waited_for(address, first):
    with socket.create_connection(address) as connection:
        if first:
            connection.sendall(first)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        status, error = error_in(answer(connection))
    assert (status, error["type"]) == (408, "invalid_request_error")


def test_endless_headers_are_refused(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        with contextlib.suppress(OSError):  # it may end while this is sent
            for number in range(200):
                connection.sendall(b"X-%d: %s\r\n" % (number, b"x" * 1000))
        with contextlib.suppress(ConnectionResetError):
            assert error_in(answer(connection))[0] == 431


def test_what_is_no_http_is_told_so_in_json(address):
    with socket.create_connection(address) as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert error_in(answer(connection))[0] == 400


def test_hundreds_of_idle_connections_do_not_keep_others_out(address):
    with contextlib.ExitStack() as stack:
        for _ in range(300):
            stack.enter_context(socket.create_connection(address))
        assert httpx.get(f"http://{address[0]}:{address[1]}/").text == "hello"


def test_while_loading_readiness_is_red_and_nobody_is_refused_afterwards():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        end_silent_peers(listener)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with waiting_room(listener, GuardedProtocol):
            ready = httpx.get(f"{url}/ready")
            assert (ready.status_code, ready.json()["error"]["code"]) == (503, "loading")
            assert ready.headers["retry-after"]
            assert httpx.get(f"{url}/health").json() == {"status": "loading"}
            assert httpx.post(f"{url}/v1/completions", json={}).status_code == 503
            assert httpx.get(f"{url}/version").status_code == 200
        with socket.create_connection(listener.getsockname()[:2]):  # kept for who comes next
            pass


def test_json_lines_carry_the_id_of_their_request():
    record = logging.LogRecord("a.b", logging.INFO, "f", 1, "told %s", ("once",), None)
    record.fields = {"status": 200}
    token = logs.request_id.set("abc")
    try:
        line = json.loads(logs.JsonLines().format(record))
    finally:
        logs.request_id.reset(token)
    assert abs(line.pop("time") - time.time()) < 60
    assert line == {"level": "info", "logger": "a.b", "message": "told once",
                    "request_id": "abc", "status": 200}  # fmt: skip
