"""Health, readiness, and what becomes of requests when the server shall stop."""

from __future__ import annotations

import httpx
import pytest
from fake_engine import FakeEngine
from serving import running

from deltaserve.config import EngineConfig, ServerConfig
from deltaserve.engine.types import ModelInfo
from deltaserve.server.app import create_app
from deltaserve.server.drain import Drain
from deltaserve.server.tokenizers import Tokenizers


def test_a_crashed_engine_turns_readiness_red_and_health_only_if_it_stays_down(
    http: httpx.Client, engine: FakeEngine
) -> None:
    assert http.get("/ready").json() == {"status": "ready"}
    engine.dead = engine.restarting = True
    assert http.get("/ready").status_code == 503
    assert http.get("/health").json() == {"status": "recovering"}
    engine.restarting = False
    assert http.get("/health").status_code == 503


def test_a_draining_server_takes_no_new_work(
    engine: FakeEngine, all_tokenizers: Tokenizers, served: list[ModelInfo]
) -> None:
    drain = Drain()
    app = create_app(engine, all_tokenizers, ServerConfig(EngineConfig("base")), drain)
    with running(app) as url, httpx.Client(base_url=url) as http:
        assert http.get("/v1/models").status_code == 200
        drain.begin()
        refused = http.get("/v1/models")
        assert (refused.status_code, refused.headers["connection"]) == (503, "close")
        assert refused.json()["error"]["code"] == "draining"
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200


def test_it_lasts_until_all_is_done_or_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("deltaserve.server.drain.time.monotonic", lambda: now)
    drain = Drain()
    assert not drain.over(5.0)
    drain.in_flight = 1
    drain.begin()
    now = 104.9
    assert not drain.over(5.0)
    drain.in_flight = 0
    assert drain.over(5.0)
    drain.in_flight = 1
    now = 105.0
    assert drain.over(5.0)
