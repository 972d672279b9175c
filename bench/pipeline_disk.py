"""A disk of so many bytes a second: is the rate that the program promises the one that comes?

Lines come through a token bucket, whoever reads them. The plan is profiled with one thread, and
then run as advised.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deltaserve.bench.select_check import Report
from deltaserve.pipeline.lines import LineFile
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.profiling import ROWS
from deltaserve.pipeline.tuning.plans import Workload, profile
from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.tune import advised, run_traced

SPEEDS = (50e6, 100e6, 300e6)
ROW_BYTES, LINES = 50_000, 1000
BURST_S = 0.01


class Bucket:
    """Tokens come at ``speed``; at most those of ``BURST_S`` are kept."""

    def __init__(self, speed: float) -> None:
        self._speed, self._lock = speed, threading.Lock()
        self._paid = time.perf_counter()

    def take(self, tokens: float) -> None:
        """Waits until there are as many."""
        with self._lock:
            now = time.perf_counter()
            self._paid = max(self._paid, now - BURST_S) + tokens / self._speed
            wait = self._paid - now
        if wait > 0:
            time.sleep(wait)


@contextmanager
def throttled(speed: float) -> Iterator[None]:
    """All files of lines together give so many bytes a second."""
    bucket, unlimited = Bucket(speed), LineFile.read

    def read(self: LineFile, at: int) -> bytes:
        bucket.take(self.size(at))
        return unlimited(self, at)

    LineFile.read = read  # type: ignore[method-assign]
    try:
        yield
    finally:
        LineFile.read = unlimited  # type: ignore[method-assign]


def fat_lines(path: Path) -> Plan:
    path.write_text((json.dumps({"text": "x" * ROW_BYTES}) + "\n") * LINES)
    return Plan.from_jsonl(path).repeat().batch(8)


def promised(plan: Plan, speed: float, seconds: float) -> float:
    """The program's rate beside the measured one."""
    work = Workload(plan, max_threads=16)
    with throttled(speed):
        _, advice = profile(work, Settings({ROWS: 1}), seconds)
        # Worker processes would each have a disk of their own here.
        settings = Settings(advised(advice, [ROWS]).threads or {ROWS: 4})
        return advice.allocation.rate / run_traced(work.open(settings), seconds=seconds).rate


def disk(report: Report, seed: int, seconds: float = 3.0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        plan = fat_lines(Path(folder) / "fat.jsonl")
        for speed in SPEEDS:
            label = f"{speed / 1e6:.0f} MB/s: promised rate / measured"
            report.within("disk", label, promised(plan, speed, seconds), 0.85, 1.15)
