"""Planted bottlenecks: is the right operator named, also where a wall clock blames another?

Five operators; in turn each is made the dear one, by CPU time with the lock, CPU time without
it (hashing), or waiting. And what recording costs, turn by turn in one run.
"""

from __future__ import annotations

import hashlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from deltaserve.bench.pipeline_stages import SOURCE, Staged, Step
from deltaserve.bench.select_check import Report
from deltaserve.pipeline.tracing import Recorder
from deltaserve.pipeline.tuning.gil import calibrate
from deltaserve.pipeline.tuning.rates import Lone, bottleneck, by_wall
from deltaserve.pipeline.tuning.tune import run_traced

BLOCK = bytes(1_000_000)
Cost = Callable[[], Any]


def python_work(steps: int = 6000) -> None:
    """Holds the lock."""
    sum(i * i for i in range(steps))


def native_work(size: int = 800_000) -> None:
    """Does not hold it."""
    hashlib.sha256(memoryview(BLOCK)[:size]).digest()


def waiting(seconds: float = 0.004) -> None:
    time.sleep(seconds)


def small() -> None:
    sum(range(400))


DEAR: dict[str, Cost] = {"python": python_work, "native": native_work, "waiting": waiting}
PLACES = (SOURCE, "parse", "tokenise", "pack")


def planted(place: str, cost: Cost, threads: int = 1) -> Staged:
    """A source, two parallel steps and a serial tail; ``cost`` at ``place``."""
    costs: dict[str, Cost] = dict.fromkeys(PLACES, small) | {place: cost}

    def source() -> Iterator[int]:
        for number in itertools.count():
            costs[SOURCE]()
            yield number

    def work(name: str, element: int) -> int:
        costs[name]()
        return element

    def pack(rows: Iterator[int]) -> Iterator[list[int]]:
        while held := list(itertools.islice(rows, 4)):
            for _ in held:
                costs["pack"]()
            yield held

    steps = [
        Step("parse", partial(work, "parse")),
        Step("tokenise", partial(work, "tokenise")),
        Step("pack", pack, serial=True),
    ]
    lanes = {"parse": threads, "tokenise": threads}
    return Staged(source, steps, lanes, Recorder())


def lock_bound(python: int = 9000, natives: int = 30) -> tuple[Staged, dict[str, Lone]]:
    """Pure Python in eight threads, beside one thread of short native calls: it lets the lock
    go at every call and must wait for it again, so per thread its wall time is the longer one."""

    def parse(number: int) -> int:
        python_work(python)
        return number

    def tag(number: int) -> int:
        for _ in range(natives):
            native_work(3000)
        return number

    steps = [Step("parse", parse), Step("tag", tag)]
    lone = {step.name: calibrate(step.work, [0]) for step in steps}
    return Staged(itertools.count, steps, {"parse": 8}, Recorder()), lone


LONE = {"python": Lone(1.0), "native": Lone(0.0), "waiting": Lone(1.0)}


def naming(report: Report, seed: int) -> None:
    named = []
    for place, (kind, cost) in itertools.product(PLACES, DEAR.items()):
        trace = run_traced(planted(place, cost), seconds=0.6)
        found = bottleneck(trace, lone={place: LONE[kind]})
        named.append(found == place)
        report.fact("names", f"{kind} planted at {place}: named", found)
    pipeline, lone = lock_bound()
    trace = run_traced(pipeline, seconds=1.5)
    found, blamed = bottleneck(trace, lone=lone), by_wall(trace)[0]
    report.fact("names", "lock-bound parse in 8 threads: named", found)
    report.fact("names", "lock-bound parse in 8 threads: by wall time", blamed)
    named.append(found == "parse")
    halved = {
        name: statistics.median(run_traced(lock_bound(*sizes)[0], seconds=1.0).rate for _ in "123")
        for name, sizes in {"": (9000, 30), "parse": (4500, 30), "tag": (9000, 15)}.items()
    }
    for name in ("parse", "tag"):
        label = f"lock-bound: rate with half the work in {name}, times"
        report.fact("names", label, halved[name] / halved[""])
    report.at_least("names", "share of planted bottlenecks named", statistics.mean(named), 1.0)


def overhead(report: Report, seed: int, seconds: float = 6.0) -> None:
    """CPU time of the thread per element, with and without a recorder, in turns of 20 elements.

    All in the calling thread: what is compared is work, not how threads were scheduled.
    """
    report.at_most("cost", "recording, share of CPU time", measure_overhead(seconds), 0.03)


def measure_overhead(seconds: float) -> float:
    streams: Mapping[bool, Iterator[Any]] = {
        recorded: _serial_stream(Recorder() if recorded else None) for recorded in (False, True)
    }
    spent: dict[bool, list[int]] = {False: [], True: []}
    end = time.perf_counter() + seconds
    for turn in itertools.count():
        recorded = bool(turn % 2)
        start = time.thread_time_ns()
        for _ in range(20):
            next(streams[recorded])
        spent[recorded].append(time.thread_time_ns() - start)
        if time.perf_counter() > end and recorded:
            break
    pairs = zip(spent[True], spent[False], strict=True)
    return statistics.median(with_it / without for with_it, without in pairs) - 1


def _serial_stream(recorder: Recorder | None) -> Iterator[Any]:
    """Four operators of 50 to 200 us in one thread, as a text pipeline has them."""

    def source() -> Iterator[int]:
        for number in itertools.count():
            sum(range(2500))
            yield number

    def work(size: int, rows: Iterator[int]) -> Iterator[int]:
        for row in rows:
            sum(range(size))
            yield row

    sizes = {"parse": 5000, "tokenise": 10_000, "pack": 2500}
    steps = [Step(name, partial(work, size), serial=True) for name, size in sizes.items()]
    return Staged(source, steps, {}, recorder)
