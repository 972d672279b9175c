"""The recorder: own times of nested calls, all threads, small cost."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from deltaserve.pipeline.trace import OperatorFigures
from deltaserve.pipeline.tracing import Recorder, figures, size_of


def burn(ns):
    """So much CPU time of this thread."""
    end = time.thread_time_ns() + ns
    while time.thread_time_ns() < end:
        pass


def nested(recorder, calls, *, inner_ns, outer_ns, sleep_s=0.0):
    """An operator that calls another one."""
    source, mapped = recorder.operator("source"), recorder.operator("map")
    for _ in range(calls):
        mapped.begin()
        source.begin()
        burn(inner_ns)
        if sleep_s:
            time.sleep(sleep_s)
        source.end(np.zeros(16, np.int32))
        burn(outer_ns)
        mapped.end("four", taken=1)


def found(recorder, name):
    return figures(OperatorFigures(name, "map"), recorder.totals()[name])


def test_clocks_stop_while_an_input_is_called():
    recorder = Recorder()
    nested(recorder, 40, inner_ns=300_000, outer_ns=100_000, sleep_s=0.001)
    source, mapped = found(recorder, "source"), found(recorder, "map")
    assert source.cpu_ns / 40 == pytest.approx(300_000, rel=0.35)
    assert mapped.cpu_ns / 40 == pytest.approx(100_000, rel=0.35)
    assert source.waited_ns / 40 > 0.9e6  # asleep
    assert mapped.waited_ns / 40 < 0.3e6
    assert (mapped.made, mapped.taken, source.made) == (40, 40, 40)
    assert (source.bytes, mapped.bytes) == (40 * 64, 40 * 4)


@pytest.mark.slow  # CPU time is only sampled: wants cores of its own
def test_few_of_many_short_calls_are_timed_and_scaled_to_all():
    recorder = Recorder()
    nested(recorder, 3000, inner_ns=20_000, outer_ns=5_000)
    source = found(recorder, "source")
    assert source.made == 3000
    assert source.timed < 1500
    assert source.cpu_ns / 3000 == pytest.approx(20_000, rel=0.4)


def test_slow_calls_between_quick_ones_are_timed():
    """A worker's first call is quick (it reads), and in a short trace there are few slow ones."""
    recorder = Recorder()
    quick, slow = recorder.operator("quick"), recorder.operator("slow")
    for _ in range(8):
        quick.begin()
        quick.end()
        slow.begin()
        time.sleep(0.02)
        slow.end()
    assert found(recorder, "slow").timed >= 6
    assert found(recorder, "slow").waited_ns / 8 == pytest.approx(20e6, rel=0.2)


def test_all_threads_count_to_the_last_call():
    recorder = Recorder()
    work = {"inner_ns": 1000, "outer_ns": 1000}
    threads = [threading.Thread(target=nested, args=(recorder, 250), kwargs=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found(recorder, "map").made == found(recorder, "source").made == 1000


@pytest.mark.slow
def test_recording_costs_little():
    """Against the work alone, turn by turn in one run, in CPU time."""
    recorder = Recorder()
    source, mapped = recorder.operator("source"), recorder.operator("map")
    plain, traced = [], []

    def work():
        sum(range(9000))

    for _ in range(60):
        start = time.thread_time_ns()
        for _ in range(20):
            work()
            work()
        middle = time.thread_time_ns()
        for _ in range(20):
            mapped.begin()
            source.begin()
            work()
            source.end()
            work()
            mapped.end(taken=1)
        plain.append(middle - start)
        traced.append(time.thread_time_ns() - middle)
    assert np.median(traced) < 1.06 * np.median(plain)


def test_sizes():
    assert size_of({"a": "abc", "b": [1, 2], "c": np.zeros((2, 3), np.int64)}) == 3 + 16 + 48
    assert size_of([1] * 100) == 800
    assert size_of(b"abc") == 3
