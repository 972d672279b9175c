"""What is planted in a server shows in the report of its load test."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest

from deltaserve.bench.load import arrivals
from deltaserve.bench.load.execute import Target, measure
from deltaserve.bench.load.result import document
from deltaserve.bench.load.runner import Run
from deltaserve.bench.load.text import render
from deltaserve.bench.load.traces import Row
from deltaserve.bench.load.workload import make_workload
from tests.bench.fake_server import Behaviour, fake_server
from tests.bench.running import run, steady

SLACK = 0.15
"""Seconds that a busy machine may add."""


def test_a_planted_delay_is_measured():
    behaviour = Behaviour(first=lambda body, key: 0.15, gap=0.02)
    found = run(behaviour, **steady(20, 20), output=11)["summary"]
    assert found["completed"] == 20
    assert 0.15 <= found["ttft"]["p50"] <= 0.15 + SLACK
    # The last part is followed by a gap too: 11 gaps over 10 tokens.
    assert 0.02 <= found["tpot"]["p50"] <= 0.022 + SLACK
    assert 0.02 <= found["itl"]["p50"] <= 0.02 + SLACK
    assert 0.37 <= found["e2e"]["p50"] <= 0.37 + 3 * SLACK
    assert found["itl"]["count"] == 20 * 10
    assert found["output_tokens"] == 20 * 11


def test_a_delay_of_one_model_shows_in_that_model_only():
    behaviour = Behaviour(first=lambda body, key: 0.4 if body["model"] == "beta" else 0.0)
    models = run(behaviour, **steady(30, 30), output=2, popularity="round_robin")["models"]
    assert models["beta"]["ttft"]["p50"] >= 0.4
    assert models["alpha"]["ttft"]["p99"] < 0.4
    assert [models[name]["requests"] for name in ("alpha", "base", "beta")] == [10, 10, 10]


def test_latency_counts_from_the_scheduled_time():
    """One slot, 0.1 s each, asked twice as fast: the queue grows, and an open loop sees it."""
    behaviour = Behaviour(first=lambda body, key: 0.1, slots=1)
    found = run(behaviour, **steady(20, 12), output=1)["summary"]
    assert found["ttft"]["max"] > 0.6
    closed = {"arrivals": {"kind": "closed", "concurrency": 1}, "requests": 6}
    assert run(behaviour, **closed, output=1)["summary"]["ttft"]["p50"] < 0.1 + SLACK


def test_waiting_in_the_client_counts_and_is_shown():
    behaviour = Behaviour(first=lambda body, key: 0.1)
    found = run(behaviour, **steady(20, 12), output=1, max_concurrency=1)["summary"]
    assert found["ttft"]["max"] > 0.6
    assert found["lateness"]["max"] > 0.5
    assert found["max_concurrent"] == 1


def test_planted_unfairness_shows(monkeypatch):
    monkeypatch.setenv("KEY_0", "poor")
    monkeypatch.setenv("KEY_1", "rich")
    content = {
        "tenants": 2,
        "api_key_env": "KEY_{i}",
        "arrivals": {"kind": "closed", "concurrency": 2},
        "duration": 0.7,
        "output": 4,
        "alone": True,
    }
    fair = Behaviour(first=lambda body, key: 0.05)
    even = run(fair, **content)
    assert set(fair.keys_seen) >= {"poor", "rich"}
    assert even["fairness"]["jain_service"] > 0.95
    busy = threading.Event()

    def first(body: dict[str, Any], key: str) -> float:
        if key == "rich":
            busy.set()
        return 0.4 if key == "poor" and busy.is_set() else 0.05

    # The first of the two runs alone, before the other has been seen.
    skewed = run(Behaviour(first=first), **content)
    fairness = skewed["fairness"]
    assert fairness["jain_service"] < 0.8
    assert fairness["jain_speed"] < 0.8
    assert fairness["service"]["tenant-1"] > 3 * fairness["service"]["tenant-0"]
    assert (
        fairness["max_backlogged_service_difference"]
        > even["fairness"]["max_backlogged_service_difference"]
    )
    assert skewed["slowdown"]["tenant-0"]["ttft_p50"] > 3
    assert skewed["slowdown"]["tenant-1"]["ttft_p50"] < 2
    assert even["slowdown"]["tenant-0"]["ttft_p50"] < 2


def test_probes_show_a_stall_and_are_no_part_of_the_load():
    began: list[float] = []

    def first(body: dict[str, Any], key: str) -> float:
        began.append(time.monotonic())
        stalled = 1.0 < time.monotonic() - began[0] < 1.3
        return 0.3 if stalled else 0.0

    content = steady(5, 10) | {"probes": {"rate": 20}, "output": 3}
    result = run(Behaviour(first=first), **content)
    assert result["summary"]["requests"] == 10
    assert result["probes"]["requests"] > 20
    assert result["probes"]["ttft"]["max"] >= 0.3
    assert result["probes"]["ttft"]["p50"] < 0.1


def test_conversations_repeat_what_was_said():
    behaviour = Behaviour(gap=0.01)
    turns = {"count": 3, "think": 0.1}
    content = {**steady(5, 2), "turns": turns, "output": 2, "models": ["alpha"], "warmup": 0}
    result = run(behaviour, endpoint="chat", **content)
    assert result["summary"]["completed"] == 6
    lengths = sorted(len(body["messages"]) for body in behaviour.seen)
    assert lengths == [1, 1, 1, 1, 3, 3, 5, 5]  # the first two measure the tokenizer
    last = max(behaviour.seen, key=lambda body: len(body["messages"]))["messages"]
    assert [m["role"] for m in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[1]["content"] == "tok tok "
    requests = result["requests"]
    second = [i for i, turn in enumerate(requests["turn"]) if turn == 1]
    assert all(requests["scheduled"][i] > 0.1 for i in second)
    run(behaviour, **content)  # and as plain text
    assert max(str(body.get("prompt", "")).count("tok tok") for body in behaviour.seen) == 2


def test_prompts_get_the_length_asked_for():
    """The fake server counts two tokens for each word and one more."""
    result = run(Behaviour(), **steady(50, 5), prompt=41, output=1)
    assert result["requests"]["prompt_tokens"] == [41] * 5
    ids = run(Behaviour(), **steady(50, 5), prompt=41, output=1, token_ids=[5, 50])
    assert ids["requests"]["prompt_tokens"] == [41] * 5


def test_the_servers_own_numbers_are_recorded():
    metrics = (
        "# HELP vllm:num_requests_running now\n"
        'vllm:num_requests_running{model_name="a"} 3\n'
        'vllm:num_requests_running{model_name="b"} 4\n'
        'deltaserve:deltas{tier="device"} 2\ndeltaserve:deltas{tier="host"} 5\n'
        'vllm:time_to_first_token_seconds_bucket{le="1"} 9\nbroken line\n'
    )
    stats = {"steps": 10, "mixed_steps": 5, "residency": {"hits": 3, "misses": 1}, "tenants": {}}
    behaviour = Behaviour(metrics=metrics, stats=stats)
    server = run(behaviour, **steady(20, 10), output=1, scrape=0.2)["server"]
    series = server["series"]
    assert series["vllm:num_requests_running"]["mean"] == 7
    assert series["deltaserve:deltas{tier=host}"]["last"] == 5
    assert series["stats.residency.hits"]["last"] == 3
    assert not any("bucket" in name for name in series)
    assert len(server["over_time"]["seconds"]) >= 3


def test_users_of_a_closed_loop_come_one_after_the_other_and_think():
    loop = {"kind": "closed", "concurrency": 4, "ramp": 0.4, "think": 0.2}
    requests = run(Behaviour(), arrivals=loop, duration=1.0, output=1)["requests"]
    sent = requests["sent"]
    assert [round(each, 1) for each in sent[:2]] == [0.0, 0.1]
    # 4 users, each about every 0.2 s for what is left of the second.
    assert 8 <= len(sent) <= 18


def test_what_a_user_thinks_after_the_last_answer_is_not_measured():
    loop = {"kind": "closed", "concurrency": 1, "think": 0.8}
    result = run(Behaviour(first=lambda body, key: 0.1), arrivals=loop, requests=2, output=4)
    assert result["seconds"] == pytest.approx(max(result["requests"]["finished"]), abs=1e-5)
    assert 1.0 <= result["seconds"] <= 1.0 + 2 * SLACK  # 0.1, 0.8, 0.1
    assert result["summary"]["request_throughput"] == pytest.approx(2 / result["seconds"])
    # Nobody thinks past the end, either.
    began = time.monotonic()
    run(Behaviour(), arrivals=loop | {"think": 30.0}, duration=0.5, output=4)
    assert time.monotonic() - began < 10


def test_the_last_request_allowed_ends_the_run():
    """And not the time of the next one, which is never sent."""
    began = time.monotonic()
    result = run(Behaviour(), **steady(0.1, 5), max_requests=1, output=2)
    assert (result["ended"], result["summary"]["completed"]) == ("complete", 1)
    assert time.monotonic() - began < 8
    assert result["seconds"] < 1


def test_files_are_read_before_the_clock_runs(tmp_path, monkeypatch):
    rows = "".join(f"2023-11-16 18:17:03.{i}00000,4,2\n" for i in range(3))
    (tmp_path / "t.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + rows)
    read = arrivals.read_trace

    def slowly(path: Path) -> list[Row]:
        time.sleep(0.6)
        return read(path)

    monkeypatch.setattr(arrivals, "read_trace", slowly)
    trace = {"name": "one", "arrivals": {"kind": "trace", "path": str(tmp_path / "t.csv")}}
    other = {"name": "two"} | steady(20, 5) | {"output": 2}
    found = run(Behaviour(), tenants=[trace, other])["summary"]
    assert found["completed"] == 8
    assert found["lateness"]["max"] < 0.4


def test_a_client_that_stood_still_says_so():
    stood: list[float] = []

    def stand_still(name: str, run: Run) -> None:
        if run.in_flight and not stood:
            stood.append(1.3)
            time.sleep(1.3)

    with fake_server(Behaviour(first=lambda body, key: 0.2)) as server:
        # Long enough that the one late timer is less than 1 % of all.
        workload = make_workload(steady(20, 140) | {"output": 1})
        measured = measure(Target(server.url), workload, stand_still)
    result = document(measured)
    assert 1.2 <= result["client"]["stood_still"] <= 1.3 + 2 * SLACK
    assert "THE CLIENT STOOD STILL for 1." in render(result)
    assert run(Behaviour(), **steady(50, 3), output=1)["client"]["stood_still"] == 0.0
