"""The threads that load: order, failures, and jobs that never end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from deltaserve.engine.loader import THREADS, Done, Job, Loader
from deltaserve.engine.versions import DeltaVersion
from deltaserve.errors import ArtifactError


def job(name: str) -> Job:
    return Job("load", cast(DeltaVersion, SimpleNamespace(name=name)))


def collect(loader: Loader, count: int) -> list[Done]:
    done: list[Done] = []
    deadline = time.monotonic() + 30
    while len(done) < count:
        assert time.monotonic() < deadline, "a job did not end"
        loader.wait(1.0)
        done += loader.collect()
    return done


@pytest.fixture
def stuck() -> Iterator[Callable[[], object]]:
    """Work that does not end before the test does."""
    go_on = threading.Event()
    yield lambda: go_on.wait(60)
    go_on.set()


def test_results_and_errors_are_collected_once() -> None:
    loader = Loader()

    def fail() -> object:
        raise ArtifactError("it is damaged")

    def surprise() -> object:
        raise KeyError("x")

    assert loader.idle
    loader.submit(job("good"), lambda: 7)
    loader.submit(job("bad"), fail)
    assert loader.full
    loader.submit(job("odd"), surprise)
    found = {done.job.version.name: done for done in collect(loader, 3)}
    assert (found["good"].result, found["good"].error) == (7, None)
    assert found["bad"].error == "it is damaged"
    assert "KeyError" in (found["odd"].error or "")
    assert loader.idle
    assert loader.collect() == []
    loader.close()


def test_stuck_jobs_fail_and_leave_their_threads_to_others(stuck: Callable[[], object]) -> None:
    loader = Loader(timeout_s=0.2)
    for i in range(THREADS):
        loader.submit(job(f"stuck{i}"), stuck)
    loader.submit(job("good"), lambda: "loaded")
    done = collect(loader, THREADS + 1)
    assert [d.error for d in done if d.job.version.name == "good"] == [None]
    errors = [d.error or "" for d in done if d.job.version.name != "good"]
    assert len(errors) == THREADS
    assert all("within 0.2 s (load_timeout_s)" in error for error in errors)
    assert loader.idle
    loader.close()


def test_a_job_that_ends_after_it_was_given_up_is_dropped() -> None:
    loader = Loader(timeout_s=0.1)
    go_on, ended = threading.Event(), threading.Event()

    def work() -> object:
        go_on.wait(60)
        ended.set()
        return "too late"

    loader.submit(job("late"), work)
    (done,) = collect(loader, 1)
    assert done.result is None
    go_on.set()
    assert ended.wait(10)
    loader.submit(job("next"), lambda: "in time")
    (done,) = collect(loader, 1)
    assert (done.job.version.name, done.result) == ("next", "in time")
    assert loader.collect() == []
    loader.close()


def test_closing_stops_idle_threads_and_drops_what_waits(
    stuck: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaserve.engine.loader.CLOSE_S", 0.1)
    loader = Loader()
    ran: list[str] = []
    for i in range(THREADS):
        loader.submit(job(f"stuck{i}"), stuck)
    loader.submit(job("waits"), lambda: ran.append("waits"))
    loader.close()
    time.sleep(0.05)
    assert ran == []


def test_closing_waits_for_a_job_that_computes() -> None:
    loader = Loader()
    ended = []

    def work() -> None:
        time.sleep(0.3)
        ended.append(True)

    loader.submit(job("computes"), work)
    time.sleep(0.1)  # a thread has taken it
    loader.close()
    assert ended


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="Linux only")
def test_loading_threads_give_way_to_the_engine() -> None:
    loader = Loader()

    def priority() -> Any:
        tid = threading.get_native_id()
        return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, tid)

    loader.submit(job("asks"), priority)
    (done,) = collect(loader, 1)
    policy, nice = done.result
    assert policy == os.SCHED_OTHER
    assert nice > os.getpriority(os.PRIO_PROCESS, 0) or nice == 19
    loader.close()
