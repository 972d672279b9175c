"""However requests and runs end, the report counts it as what it was."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from deltaserve.bench.load.execute import Target, measure
from deltaserve.bench.load.target import TargetError
from deltaserve.bench.load.text import render
from deltaserve.bench.load.workload import make_workload
from deltaserve.errors import ConfigError
from tests.bench.fake_server import Behaviour
from tests.bench.running import run, steady


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        ("429", "http 429"),
        ("500", "http 500"),
        ("cut", "disconnected"),
        ("event", "error in the stream"),
        ("garbage", "malformed answer"),
    ],
)
def test_errors_are_counted_by_kind_and_miss_every_objective(failure, kind):
    def plant(number: int, body: dict[str, Any], key: str) -> str | None:
        return failure if body["max_tokens"] == 6 and number % 2 else None

    result = run(Behaviour(failure=plant), **steady(50, 20), output=6, slo={"e2e": 10})
    found = result["summary"]
    assert found["errors"] == {kind: 10}
    assert found["completed"] == 10
    assert found["slo_attainment"] == 0.5
    assert found["goodput"] == pytest.approx(found["request_throughput"])
    assert f"{kind}:" in render(result)


def test_timeouts_and_empty_answers():
    slow = Behaviour(first=lambda body, key: 5.0 if body["max_tokens"] == 3 else 0.0)
    found = run(slow, **steady(50, 3), output=3, request_timeout=0.3)["summary"]
    assert found["errors"] == {"timed out": 3}
    empty = Behaviour(failure=lambda n, body, key: "empty" if body["max_tokens"] == 3 else None)
    result = run(empty, **steady(50, 3), output=3)
    assert (result["summary"]["completed"], result["summary"]["empty"]) == (3, 3)
    assert "3 answers had no tokens" in render(result)


def test_cancelled_requests_are_no_failures():
    behaviour = Behaviour(gap=0.05)
    cancel = {"fraction": 0.5, "after": 0.2}
    found = run(behaviour, **steady(40, 40), output=10, cancel=cancel, slo={"e2e": 5})["summary"]
    assert 10 <= found["cancelled"] <= 30
    assert found["completed"] == 40 - found["cancelled"]
    assert (found["failed"], found["slo_attainment"]) == (0, 1.0)


def test_a_dying_server_ends_the_run_and_what_was_measured_stays():
    def plant(number: int, body: dict[str, Any], key: str) -> str | None:
        return "die" if number == 15 else None

    began = time.monotonic()
    result = run(Behaviour(failure=plant), **steady(20, 2000), output=4, give_up=0.5)
    assert time.monotonic() - began < 10
    assert result["ended"] == "server died"
    assert result["summary"]["completed"] >= 5
    assert set(result["summary"]["errors"]) <= {
        "disconnected",
        "connection failed",
        "unfinished",
    }
    assert "PARTIAL: the run ended early: server died" in render(result)


def test_an_interrupt_keeps_what_was_measured():
    def interrupt(number: int, body: dict[str, Any], key: str) -> None:
        if number == 15:
            os.kill(os.getpid(), signal.SIGINT)

    behaviour = Behaviour(gap=0.02, failure=interrupt)
    result = run(behaviour, **steady(20, 2000), output=4)
    assert result["ended"] == "interrupted"
    assert 3 <= result["summary"]["completed"] <= 15


def test_an_interrupt_of_a_run_alone_keeps_those_before_and_says_whose_it_is():
    asked: list[str] = []

    def interrupt(number: int, body: dict[str, Any], key: str) -> None:
        asked.append(body["model"])
        if asked.count("beta") == 12:
            os.kill(os.getpid(), signal.SIGINT)

    tenants = [{"name": "one", "models": ["alpha"]}, {"name": "two", "models": ["beta"]}]
    behaviour = Behaviour(gap=0.01, failure=interrupt)
    result = run(behaviour, **steady(40, 20), tenants=tenants, alone=True, output=2)
    assert (result["ended"], result["only"]) == ("interrupted", "two")
    assert result["tenants"].keys() == {"two"}
    assert result["slowdown"]["one"]["alone"]["completed"] == 20
    assert result["slowdown"].keys() == {"one"}
    assert "These numbers are of two alone; the run of all" in render(result)


def test_signals_do_afterwards_what_they_did_before():
    def before(number: int, frame: object) -> None: ...

    system = {number: signal.signal(number, before) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        run(Behaviour(), **steady(50, 2), output=1)
        assert all(signal.getsignal(number) is before for number in system)
    finally:
        for number, handler in system.items():
            signal.signal(number, handler)


def test_max_time_and_max_requests():
    result = run(Behaviour(gap=0.05), **steady(20, 2000), output=10, max_time=1.0)
    assert result["ended"] == "max time"
    assert 0.9 < result["seconds"] < 1.5
    assert result["summary"]["errors"].keys() == {"unfinished"}
    result = run(Behaviour(), **steady(50, 2000), output=2, max_requests=7)
    assert (result["ended"], result["summary"]["requests"]) == ("complete", 7)


def test_a_wall_clock_that_jumps_changes_nothing(monkeypatch):
    jumps = iter(range(0, 10**9, 3600))
    monkeypatch.setattr(time, "time", lambda: 1e9 - next(jumps))
    found = run(Behaviour(gap=0.01), **steady(20, 10), output=4)["summary"]
    assert found["completed"] == 10
    assert 0 < found["e2e"]["p50"] < 0.4


def test_refusals_before_anything_is_measured():
    with pytest.raises(TargetError, match="refuses the key of tenant 'default': no such key"):
        run(Behaviour(keys=frozenset({"right"})), key="wrong", **steady(10, 1))
    assert run(Behaviour(keys=frozenset({"right"})), key="right", **steady(10, 1))
    with pytest.raises(TargetError, match="no server answers at"):
        measure(Target("http://127.0.0.1:9"), make_workload({}), lambda name, run: None)
    with pytest.raises(TargetError, match=r"http 400: as told.*ignore_eos: false"):
        run(Behaviour(failure=lambda n, body, key: "400"), **steady(10, 1))


def test_a_broken_file_of_the_last_tenant_is_found_before_anybody_is_asked(tmp_path):
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nnever,1,2\n")
    trace = {"kind": "trace", "path": str(tmp_path / "t.csv")}
    tenants = [{"name": "one", **steady(50, 3)}, {"name": "two", "arrivals": trace}]
    behaviour = Behaviour()
    with pytest.raises(ConfigError, match="line 2: TIMESTAMP is 'never'"):
        run(behaviour, tenants=tenants, alone=True)
    with pytest.raises(ConfigError, match=r"probes\.model: the server has no model 'zeta'"):
        run(behaviour, **steady(50, 3), probes={"model": "zeta"})
    assert behaviour.seen == []


def test_thresholds_pass_and_fail():
    thresholds = [
        {"metric": "tenants.default.ttft.p99", "max": 0.05},
        {"metric": "summary.completed", "min": 5},
        {"metric": "server.series.nothing.growth", "max": 1},
    ]
    behaviour = Behaviour(first=lambda body, key: 0.1)
    result = run(behaviour, **steady(20, 5), output=1, thresholds=thresholds)
    assert [each["passed"] for each in result["thresholds"]] == [False, True, False]
    text = render(result)
    assert "FAIL  tenants.default.ttft.p99" in text
    assert "PASS  summary.completed: 5 (at least 5)" in text
    assert "FAIL  server.series.nothing.growth: not measured" in text
