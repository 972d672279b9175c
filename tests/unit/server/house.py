"""A server with two tenants and an administrator."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import httpx
from fake_engine import FakeEngine
from serving import running

from deltaserve.config import EngineConfig, ServerConfig, hash_key
from deltaserve.server.app import create_app
from deltaserve.server.office import Office
from deltaserve.server.tokenizers import Tokenizers
from deltaserve.server.traces import Tracing
from deltaserve.tenancy.keys import digest

ADMIN = "admin-secret"
ACME, GLOBEX = "sk-acme", "sk-globex"
ASK = {"model": "base", "prompt": "hello", "max_tokens": 5}


def write_tenants(folder: Path, **acme: object) -> str:
    tenants = [
        {"id": "acme", "models": ["chatty", "base"], "weight": 2, "priority": 1, **acme,
         "keys": [{"sha256": digest(ACME)}]},
        {"id": "globex", "models": ["team/*", "base"], "keys": [{"sha256": digest(GLOBEX)}]},
    ]  # fmt: skip
    (folder / "tenants.yaml").write_text(json.dumps({"tenants": tenants}))
    return str(folder / "tenants.yaml")


class House:
    """A server with two tenants and an administrator."""

    def __init__(self, url: str, state: Path, engine: FakeEngine, office: Office) -> None:
        self.url, self.state, self.engine, self.office = url, state, engine, office

    def ask(self, key: str | None, method: str, path: str, **more: object) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        return httpx.request(method, self.url + path, headers=headers, timeout=10, **more)

    def get(self, key: str | None, path: str) -> httpx.Response:
        return self.ask(key, "GET", path)

    def complete(self, key: str, **changes: object) -> httpx.Response:
        return self.ask(key, "POST", "/v1/completions", json=ASK | changes)

    def records(self) -> list[tuple]:
        query = (
            "SELECT tenant, model, outcome, prompt_tokens, cached_tokens, completion_tokens "
            "FROM usage ORDER BY created"
        )
        with closing(sqlite3.connect(self.state / "accounts.sqlite")) as connection:
            return connection.execute(query).fetchall()

    def eventually(self, count: int) -> list[tuple]:
        deadline = time.monotonic() + 5
        while len(self.records()) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.records()


@contextlib.contextmanager
def opened(
    folder: Path,
    engine: FakeEngine,
    tokenizers: Tokenizers,
    tracing: Tracing | None = None,
    **acme: object,
):
    config = ServerConfig(
        EngineConfig("base"),
        tenants=write_tenants(folder, **acme),
        admin_key_sha256=hash_key(ADMIN),
        state_dir=str(folder / "state"),
    )
    with (
        closing(Office.open(config)) as office,
        running(create_app(engine, tokenizers, config, office=office, tracing=tracing)) as url,
    ):
        yield House(url, folder / "state", engine, office)


def error_of(response: httpx.Response, status: int) -> dict:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
