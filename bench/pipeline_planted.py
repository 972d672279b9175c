"""Planted bottlenecks in real plans: is the right operator named, also where a wall clock
blames another? And what recording costs.

A source, two operators on rows and one on batches; in turn each is made the dear one, by CPU
time with the interpreter's lock, CPU time without it (hashing), or waiting.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from deltaserve.bench.pipeline_cases import CASES
from deltaserve.bench.pipeline_text import write
from deltaserve.bench.select_check import Report
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.profiling import ROWS, Profiled
from deltaserve.pipeline.tuning.plans import Workload, profile
from deltaserve.pipeline.tuning.rates import by_wall
from deltaserve.pipeline.tuning.recommend import advise
from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.tune import run_traced

BLOCK = bytes(1_000_000)
BATCH = 4
Row = dict[str, Any]


def python_work(row: Row, steps: int = 6000) -> Row:
    """Holds the lock."""
    sum(i * i for i in range(steps))
    return row


def native_work(row: Row, size: int = 800_000) -> Row:
    """Does not hold it."""
    hashlib.sha256(memoryview(BLOCK)[:size]).digest()
    return row


def waiting(row: Row, seconds: float = 0.002) -> Row:
    time.sleep(seconds)
    return row


def little(row: Row) -> Row:
    sum(range(400))
    return row


def short_calls(row: Row, calls: int = 30) -> Row:
    """Lets the lock go and wants it again, many times."""
    for _ in range(calls):
        hashlib.sha256(memoryview(BLOCK)[:3000]).digest()
    return row


DEAR: dict[str, Callable[[Row], Row]] = {
    "python": python_work,
    "native": native_work,
    "waiting": waiting,
}
PLACES = ("parse", "tokenise", "collate")


def planted(lines: Path, place: str, dear: Callable[[Row], Row]) -> Plan:
    """collate works on batches, for as long as the others would on all their rows."""
    work = dict.fromkeys(PLACES, little) | {place: dear}
    rows = Plan.from_jsonl(lines).map(work["parse"], name="parse")
    rows = rows.map(work["tokenise"], name="tokenise").repeat().batch(BATCH)
    return rows.map(partial(_times, work["collate"]), name="collate")


def _times(work: Callable[[Row], Row], batch: Row) -> Row:
    for _ in range(BATCH):
        batch = work(batch)
    return batch


def lock_bound(lines: Path, steps: int = 9000, calls: int = 30) -> Plan:
    """Pure Python, beside short native calls: in eight threads these wait for the lock at every
    call, so their wall time is the longer one."""
    rows = Plan.from_jsonl(lines).map(partial(python_work, steps=steps), name="parse").repeat()
    # A flat_map is not fused with a map.
    return rows.flat_map(partial(_tagged, calls), name="tag").batch(BATCH)


def _tagged(calls: int, row: Row) -> list[Row]:
    return [short_calls(row, calls)]


def write_lines(path: Path, rows: int, unused: int = 0) -> Path:
    """unused: numbers of a field that nobody reads, but the parser has to."""
    field = {"unused": list(range(unused))} if unused else {}
    path.write_text("".join(json.dumps({"n": n} | field) + "\n" for n in range(rows)))
    return path


def naming(report: Report, seed: int, seconds: float = 1.0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = write_lines(Path(folder) / "rows.jsonl", 2000)
        fat = write_lines(Path(folder) / "fat.jsonl", 200, unused=20_000)
        named = [_named(report, "source", "python", planted(fat, "parse", little), seconds)]
        for place, kind in itertools.product(PLACES, DEAR):
            plan = planted(lines, place, DEAR[kind])
            named.append(_named(report, place, kind, plan, seconds))
        named.append(_lock_bound(report, lines, 2 * seconds))
    report.at_least("names", "share of planted bottlenecks named", statistics.mean(named), 1.0)


def _named(report: Report, place: str, kind: str, plan: Plan, seconds: float) -> bool:
    _, advice = profile(Workload(plan), Settings({ROWS: 2}), seconds)
    report.fact("names", f"{kind} planted at {place}: named", advice.slowest)
    return advice.slowest == ("jsonl" if place == "source" else place)


def _lock_bound(report: Report, lines: Path, seconds: float) -> bool:
    eight = Settings({ROWS: 8})
    work = Workload(lock_bound(lines))
    trace = run_traced(work.open(eight), seconds=seconds)
    found = advise(trace, **work.knowledge()).slowest
    report.fact("names", "lock-bound parse in 8 threads: named", found)
    report.fact("names", "lock-bound parse in 8 threads: by wall time", by_wall(trace)[0])
    halves = {"": {}, "parse": {"steps": 4500}, "tag": {"calls": 15}}
    rates = {
        name: statistics.median(
            run_traced(Workload(lock_bound(lines, **less)).open(eight), seconds=seconds).rate
            for _ in range(3)
        )
        for name, less in halves.items()
    }
    for name in ("parse", "tag"):
        label = f"lock-bound: rate with half the work in {name}, times"
        report.fact("names", label, rates[name] / rates[""])
    return found == "parse"


def overhead(report: Report, seed: int, seconds: float = 30.0) -> None:
    """CPU time per element of the chat case, with and without a recorder, in turns; rows are
    computed as they are asked for, so that what is compared is work, not how threads were
    scheduled."""
    with tempfile.TemporaryDirectory() as folder:
        plan = CASES[0].make(write(Path(folder), 1000, seed))
        share, spread = measure_overhead(plan, seconds)
    report.fact("cost", "recording: half the turns lie within (+-)", spread)
    report.at_most("cost", "recording, share of CPU time", share, 0.03)


def measure_overhead(plan: Plan, seconds: float) -> tuple[float, float]:
    """Median over turns of 8 elements, of both at the same place in the stream; and how far
    from it half the turns lie."""
    running = [Profiled(plan, Settings({ROWS: 0}, prefetch=0), record=r) for r in (False, True)]
    ratios: list[float] = []
    try:
        for each in running:
            next(each)
        end = time.perf_counter() + seconds
        for turn in itertools.count():
            spent = [0, 0]
            for which in ((0, 1), (1, 0))[turn % 2]:
                start = time.process_time_ns()
                for _ in range(8):
                    next(running[which])
                spent[which] = time.process_time_ns() - start
            ratios.append(spent[1] / spent[0] - 1)
            if time.perf_counter() > end:
                break
    finally:
        for each in running:
            each.close()
    middle = statistics.median(ratios)
    return middle, statistics.median(abs(each - middle) for each in ratios)
