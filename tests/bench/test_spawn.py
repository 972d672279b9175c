"""``bench serve --spawn`` when the server dies: the report, its last words, and its log stay."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from deltaserve.cli.main import dispatch

SERVER = """
import os, time
from tests.bench.fake_server import Behaviour, fake_server

def plant(number, body, key):
    if number == {dies}:
        print("out of memory", flush=True)
        os._exit(3)

with fake_server(Behaviour(failure=plant)) as server:
    print(f"DeltaServe ready at {{server.url}} - 3 models", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def server_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Makes a fake server stand in for deltaserve serve; it ends at its n-th request."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def at(dies: int) -> None:
        (tmp_path / "server.py").write_text(SERVER.format(dies=dies))
        program = tmp_path / "program"
        program.write_text(
            f"#!/bin/sh\nPYTHONPATH={Path.cwd()} exec {sys.executable} {tmp_path / 'server.py'}\n"
        )
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))

    return at


def kept(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "temporary").iterdir())


def load(tmp_path: Path) -> int:
    few = ["--rate", "40", "--requests", "30", "--set", "output=2", "--set", "give_up=0.5"]
    out = str(tmp_path / "r.json")
    return dispatch(["bench", "serve", "--spawn", "any.yaml", *few, "--out", out])


def test_a_server_that_dies_is_explained_and_its_log_kept(server_dies, tmp_path, capsys):
    server_dies(20)
    assert load(tmp_path) == 1
    said = capsys.readouterr()
    assert "PARTIAL: the run ended early: server died" in said.out
    (line,) = said.err.splitlines()
    assert "the server ended: exit code 3" in line
    assert "out of memory" in line
    (log,) = re.findall(r"all of it in (\S+)\)", line)
    assert "out of memory" in Path(log).read_text()
    assert json.loads((tmp_path / "r.json").read_text())["summary"]["completed"] > 0


def test_a_server_that_does_not_start_leaves_its_log(server_dies, tmp_path, capsys):
    server_dies(20)
    (tmp_path / "server.py").write_text("print('no such base')\nraise SystemExit(2)\n")
    assert load(tmp_path) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "did not start: exit code 2, it said: no such base" in line
    (log,) = re.findall(r"all of it in (\S+)\)", line)
    assert Path(log).read_text() == "no such base\n"


def test_a_server_that_lives_leaves_nothing(server_dies, tmp_path):
    server_dies(10**9)
    assert load(tmp_path) == 0
    assert kept(tmp_path) == []


def test_sigterm_while_it_starts_leaves_no_server_behind(tmp_path, monkeypatch, capsys):
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def end_it() -> None:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    def not_asked(number: int, frame: object) -> None:
        raise AssertionError("SIGTERM came to whoever had called")

    before = signal.signal(signal.SIGTERM, not_asked)
    try:
        threading.Thread(target=end_it, daemon=True).start()
        assert load(tmp_path) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "interrupted" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
