"""The controller on real threads: planted drift while the pipeline runs."""

from __future__ import annotations

import time

import numpy as np
import pytest

from deltaserve.bench.pipeline_stages import Staged, Step
from deltaserve.pipeline.tracing import Recorder
from deltaserve.pipeline.tuning.controller import Controller
from deltaserve.pipeline.tuning.online import Autotuner


class Drifting:
    """Stages that wait (as on a network), so that two busy cores do not blur the figures."""

    def __init__(self):
        self.tokenise_s = 0.01
        steps = [
            Step("fetch", self.fetch),
            Step("tokenise", self.tokenise),
        ]
        self.pipeline = Staged(
            lambda: iter(range(10**9)), steps, {"fetch": 2, "tokenise": 2}, Recorder()
        )
        self.tuner = Autotuner(self.pipeline, Controller(32, tolerated=0.03))

    def fetch(self, element):
        time.sleep(0.002)
        return element

    def tokenise(self, element):
        time.sleep(self.tokenise_s)
        return element

    def train(self, step_s, periods, period_s=0.25):
        """Share of each period that the trainer waited; the controller looks after each."""
        stalls = []
        for _ in range(periods):
            consumed = self.pipeline.consumed
            wall, stalled = consumed.wall_ns, consumed.stalled_ns
            end = time.perf_counter() + period_s
            while time.perf_counter() < end:
                next(self.pipeline)
                time.sleep(step_s)
            stalls.append((consumed.stalled_ns - stalled) / (consumed.wall_ns - wall))
            self.tuner.look()
        return stalls


@pytest.mark.slow  # real time: wants cores of its own
def test_drift_is_followed_up_and_down():
    drifting = Drifting()
    try:
        drifting.train(0.004, 6)
        settled = drifting.pipeline.threads()["tokenise"]
        drifting.tokenise_s *= 2
        stalls = drifting.train(0.004, 8)
        raised = drifting.pipeline.threads()["tokenise"]
        assert raised > settled
        assert np.median(stalls[-3:]) < max(0.1, 0.4 * stalls[0])
        drifting.train(0.016, 12)
        assert drifting.pipeline.threads()["tokenise"] < raised
        assert drifting.pipeline.threads()["fetch"] <= 3
    finally:
        drifting.pipeline.close()
