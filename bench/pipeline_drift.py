"""Drift while a pipeline runs: the controller follows it, on real threads.

The stages wait (as on a network), so that how threads are scheduled on few cores does not blur
the figures; the trainer's step is a sleep.
"""

from __future__ import annotations

import time

from deltaserve.bench.pipeline_stages import Staged, Step
from deltaserve.bench.select_check import Report
from deltaserve.pipeline.tracing import Recorder
from deltaserve.pipeline.tuning.controller import Controller
from deltaserve.pipeline.tuning.online import Autotuner

STEP_S = 0.01
PERIOD_S = 0.5


class Drifting:
    """fetch (5 ms) and tokenise (30 ms at first), consumed every ``step_s``."""

    def __init__(self, tokenise_s: float = 0.03) -> None:
        self.tokenise_s = tokenise_s
        steps = [Step("fetch", self._fetch), Step("tokenise", self._tokenise)]
        threads = {"fetch": 2, "tokenise": 2}
        self.pipeline = Staged(lambda: iter(range(10**9)), steps, threads, Recorder())
        self.tuner = Autotuner(self.pipeline, Controller(32), PERIOD_S)

    def _fetch(self, element: int) -> int:
        time.sleep(0.005)
        return element

    def _tokenise(self, element: int) -> int:
        time.sleep(self.tokenise_s)
        return element

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
    drifting = Drifting()
    try:
        drifting.train(STEP_S, 10)
        settled = drifting.pipeline.threads()["tokenise"]
        report.fact("drift", "tokenise: threads at first", settled)
        drifting.tokenise_s *= 2
        stalls = drifting.train(STEP_S, 20)
        raised = drifting.pipeline.threads()["tokenise"]
        quiet = _first_quiet(stalls)
        report.fact("drift", "cost doubled: stall of the first period", stalls[0])
        report.at_most("drift", "cost doubled: seconds until the stall is < 2 %", quiet, 60)
        report.at_most("drift", "cost doubled: stall of the last 5 s", _mean(stalls[-10:]), 0.02)
        report.fact("drift", "tokenise: threads then", raised)
        stalls = drifting.train(2 * STEP_S, 20)
        released = drifting.pipeline.threads()["tokenise"]
        report.at_most("drift", "demand halved: threads, share of before", released / raised, 0.65)
        report.at_most("drift", "demand halved: stall of the last 5 s", _mean(stalls[-10:]), 0.02)
    finally:
        drifting.pipeline.close()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _first_quiet(stalls: list[float]) -> float:
    """Seconds after which two periods in a row stall less than 2 %."""
    for at in range(len(stalls) - 1):
        if stalls[at] < 0.02 and stalls[at + 1] < 0.02:
            return at * PERIOD_S
    return float("inf")
