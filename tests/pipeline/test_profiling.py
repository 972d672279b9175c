"""Real plans under the recorder: what is planted is what is named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from deltaserve.pipeline import Plan
from deltaserve.pipeline.profiling import CONSUMER, ROWS, Profiled, natures
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.recommend import advise
from deltaserve.pipeline.tuning.tune import run_traced


def worked(row: dict[str, Any]) -> dict[str, Any]:
    """Half a millisecond of Python."""
    end = time.thread_time() + 0.0005
    while time.thread_time() < end:
        pass
    return row


def quick(row: dict[str, Any]) -> dict[str, Any]:
    return row


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(5000)))
    return path


@pytest.mark.parametrize(
    "workers",
    [{"threads": 0}, {"threads": 2}, pytest.param({"processes": 2}, marks=pytest.mark.slow)],
)
def test_a_slow_map_is_named_wherever_it_runs(lines: Path, workers: dict[str, int]) -> None:
    plan = Plan.from_jsonl([str(lines)]).map(quick).shuffle(seed=1).map(worked).batch(8)
    trace = run_traced(Profiled(plan, **workers), seconds=2.0)
    names = [name for name, each in trace.operators.items() if each.op in ("map", "fused")]
    advice = advise(trace, Resources(cores=2))
    assert advice.bottleneck in names
    slow = advice.demands[advice.bottleneck]
    assert slow.stage == ROWS
    if "threads" in workers:  # eight rows of half a millisecond each; processes are far ahead
        assert 0.7 * 8 * 0.0005 < slow.cpu_s < 3 * 8 * 0.0005
    assert trace.operators["batch"].stage == CONSUMER
    assert trace.operators["batch"].inputs == (names[-1],)


def test_what_the_plan_says_of_its_operators(lines: Path) -> None:
    plan = Plan.from_jsonl([str(lines)]).shuffle(seed=1).map(quick).batch(8).named()
    found = natures(plan)
    assert list(found) == ["jsonl", "map", "batch"]  # a shuffle only orders numbers
    assert found["map"].inputs == ("jsonl",)
    assert found["batch"].reorders
    assert not found["map"].reorders
