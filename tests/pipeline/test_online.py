"""The controller on a running plan: planted drift while it runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deltaserve.bench.pipeline_drift import Drifting
from deltaserve.pipeline.tuning.online import window


@pytest.mark.slow  # real time: wants cores of its own
def test_drift_is_followed_up_and_down(tmp_path: Path) -> None:
    drifting = Drifting(tmp_path, row_s=0.002, tolerated=0.05)
    try:
        drifting.train(0.01, 4)
        settled = drifting.threads()
        drifting.waits.seconds *= 3
        stalls = drifting.train(0.01, 8)
        raised = drifting.threads()
        assert raised > settled
        assert np.median(stalls[-3:]) < max(0.1, 0.4 * stalls[0])
        drifting.train(0.03, 8)
        assert drifting.threads() < raised
    finally:
        drifting.pipeline.close()


def test_a_window_of_a_running_plan(tmp_path: Path) -> None:
    drifting = Drifting(tmp_path)
    try:
        drifting.train(0.001, 0.6, period_s=0.3)
        before = drifting.pipeline.trace()
        assert window(before, before) is None
        drifting.train(0.001, 0.6, period_s=0.6)
        seen = window(before, drifting.pipeline.trace())
    finally:
        drifting.pipeline.close()
    assert seen is not None
    assert seen.elements > 0
    assert seen.stall > 0.5  # two threads against a trainer that takes no time
    assert seen.stages["consumer"].serial
    assert 8 * 0.006 < seen.stages["rows"].held_s < 8 * 0.006 * 3
