"""Drift while a plan runs: the controller follows it, on real threads.

Rows wait (as on a network), so that how threads are scheduled on few cores does not blur the
figures; the trainer's step is a sleep.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from deltaserve.bench.select_check import Report
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.profiling import ROWS, Profiled
from deltaserve.pipeline.tuning.controller import Controller
from deltaserve.pipeline.tuning.online import Autotuner
from deltaserve.pipeline.tuning.settings import Settings

STEP_S = 0.02
PERIOD_S = 0.5


class Waits:
    """Of every row; changed while the plan runs."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        time.sleep(self.seconds)
        return row


class Drifting:
    """A trainer that takes a batch of eight rows every ``step_s``."""

    def __init__(self, folder: Path, row_s: float = 0.006, *, tolerated: float = 0.01) -> None:
        lines = folder / "rows.jsonl"
        lines.write_text("".join(f'{{"n": {n}}}\n' for n in range(4000)))
        self.waits = Waits(row_s)
        plan = Plan.from_jsonl(lines).map(self.waits, name="fetch").repeat().batch(8)
        self.pipeline = Profiled(plan, Settings({ROWS: 2}, prefetch=16))
        self.tuner = Autotuner(self.pipeline, Controller(32, tolerated=tolerated), PERIOD_S)

    def threads(self) -> int:
        return self.pipeline.threads()[ROWS]

    def train(self, step_s: float, seconds: float, period_s: float = PERIOD_S) -> list[float]:
        """Share of each period that the trainer waited; the controller looks after each."""
        stalls, ends = [], time.perf_counter() + seconds
        consumed = self.pipeline.consumed
        while time.perf_counter() < ends:
            wall, stalled = consumed.wall_ns, consumed.stalled_ns
            end = time.perf_counter() + period_s
            while time.perf_counter() < end:
                next(self.pipeline)
                time.sleep(step_s)
            stalls.append((consumed.stalled_ns - stalled) / (consumed.wall_ns - wall))
            self.tuner.look()
        return stalls


def drift(report: Report, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        drifting = Drifting(Path(folder))
        try:
            _follow(report, drifting)
        finally:
            drifting.pipeline.close()


def _follow(report: Report, drifting: Drifting) -> None:
    drifting.train(STEP_S, 10)
    report.fact("drift", "threads at first", drifting.threads())
    drifting.waits.seconds *= 2
    stalls = drifting.train(STEP_S, 20)
    raised = drifting.threads()
    quiet = _first_quiet(stalls)
    report.fact("drift", "cost doubled: stall of the first period", stalls[0])
    report.at_most("drift", "cost doubled: seconds until the stall is < 2 %", quiet, 60)
    report.at_most("drift", "cost doubled: stall of the last 5 s", _mean(stalls[-10:]), 0.02)
    report.fact("drift", "threads then", raised)
    stalls = drifting.train(2 * STEP_S, 20)
    released = drifting.threads()
    report.at_most("drift", "demand halved: threads, share of before", released / raised, 0.65)
    report.at_most("drift", "demand halved: stall of the last 5 s", _mean(stalls[-10:]), 0.02)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _first_quiet(stalls: list[float]) -> float:
    """Seconds after which two periods in a row stall less than 2 %."""
    for at in range(len(stalls) - 1):
        if stalls[at] < 0.02 and stalls[at + 1] < 0.02:
            return at * PERIOD_S
    return float("inf")
