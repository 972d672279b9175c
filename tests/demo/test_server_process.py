"""Whatever the server does, the demo says so in one error and leaves no process behind."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from deltaserve.demo.server_process import ServerError, server_process


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a shell script stand in for python -m deltaserve."""

    def make(script: str) -> Path:
        path = tmp_path / "program"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        return tmp_path / "server.log"

    return make


def test_ready_server_is_ended(program) -> None:
    log = program("echo loading\necho DeltaServe ready at http://127.0.0.1:42 - x\nexec sleep 60")
    with server_process(["serve"], log) as server:
        assert server.wait_until_ready(10) == "http://127.0.0.1:42"
        assert server.process.poll() is None
    assert server.process.returncode is not None


def test_arguments_and_no_key(program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DELTASERVE_API_KEY", "secret")
    log = program('echo "$@" key=$DELTASERVE_API_KEY.\nexit 3')
    said = "ended: exit code 3, it said: -m deltaserve serve base key=[.]"
    with server_process(["serve", "base"], log) as server, pytest.raises(ServerError, match=said):
        server.wait()


def test_failed_start_shows_the_log(program) -> None:
    log = program("echo one; echo two; echo three >&2; echo; echo four; exit 2")
    said = "did not start: exit code 2, it said: two / three / four"
    with server_process([], log) as server, pytest.raises(ServerError, match=said):
        server.wait_until_ready(10)


def test_slow_start_is_given_up(program) -> None:
    log = program("exec sleep 60")
    said = "not ready after 0.2 s: it said: nothing"
    with server_process([], log) as server, pytest.raises(ServerError, match=said):
        server.wait_until_ready(0.2)
    assert server.process.returncode is not None


def test_an_error_ends_the_server(program) -> None:
    log = program("exec sleep 60")
    with pytest.raises(KeyboardInterrupt), server_process([], log) as server:
        raise KeyboardInterrupt
    assert server.process.returncode is not None


def test_failed_requests_are_explained(program) -> None:
    log = program("exec sleep 60")
    with server_process([], log) as server:
        assert "a request failed: refused" in str(server.explain(OSError("refused")))
        server.process.kill()
        assert "the server ended" in str(server.explain(OSError("refused")))
