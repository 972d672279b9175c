"""Real plans under the recorder: what is planted is what is named."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from deltaserve.errors import PipelineError
from deltaserve.pipeline import Plan, open_pipeline, prepare
from deltaserve.pipeline.profiling import CONSUMER, ROWS, Profiled, stages
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.recommend import advise
from deltaserve.pipeline.tuning.settings import Settings, applied, natures
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
    [
        Settings({ROWS: 0}),
        Settings({ROWS: 2}),
        pytest.param(Settings(processes=2), marks=pytest.mark.slow),
    ],
)
def test_a_slow_map_is_named_wherever_it_runs(lines: Path, workers: Settings) -> None:
    plan = Plan.from_jsonl([str(lines)]).map(quick).shuffle(seed=1).map(worked).batch(8)
    trace = run_traced(Profiled(plan, workers), seconds=2.0)
    names = [name for name, each in trace.operators.items() if each.op in ("map", "fused")]
    advice = advise(trace, Resources(cores=2))
    assert advice.bottleneck in names
    slow = advice.demands[advice.bottleneck]
    assert slow.stage == ROWS
    if not workers.processes:  # eight rows of half a millisecond each; processes are far ahead
        assert 0.7 * 8 * 0.0005 < slow.cpu_s < 3 * 8 * 0.0005
    assert trace.operators["batch"].stage == CONSUMER
    assert trace.operators["batch"].inputs == (names[-1],)


def test_what_the_plan_says_of_its_operators(lines: Path) -> None:
    plan = Plan.from_jsonl([str(lines)]).shuffle(seed=1).map(quick).batch(8).named()
    found = natures(plan, {"jsonl": 5000}, {"map": 9.0})
    assert list(found) == ["jsonl", "map", "batch"]  # a shuffle only orders numbers
    assert found["map"].inputs == ("jsonl",)
    assert found["jsonl"].rows == 5000
    assert (found["jsonl"].bytes, found["map"].bytes) == (None, 9.0)
    assert found["batch"].reorders
    assert not found["map"].reorders


def kept(row: dict[str, Any]) -> bool:
    return bool(row["n"] % 3 == 0)


def two_segments(lines: Path) -> Plan:
    """A mix of filtered rows is not known by number, so each part is a segment."""
    parts = {
        Plan.from_jsonl([str(lines)]).filter(kept, name="third"): 1.0,
        Plan.from_jsonl([str(lines)]).map(quick, name="other").filter(kept, name="fourth"): 2.0,
    }
    return Plan.mix(parts, seed=3).batch(8)


def test_segments_have_threads_of_their_own_and_what_is_ahead_is_told(lines: Path) -> None:
    plan = two_segments(lines)
    roots = [name for name in stages(prepare(plan)).values() if name != CONSUMER]
    first, second = dict.fromkeys(roots)
    running = Profiled(plan, Settings({first: 3, second: 5}))
    try:
        for _ in range(40):
            next(running)
        running.set_parallelism(second, 2)
        assert running.threads() == {first: 3, second: 2}
        rest = [next(running)["n"].tolist() for _ in range(20)]
        trace = running.trace()
    finally:
        running.close()
    with open_pipeline(plan) as elements:
        assert [each["n"].tolist() for each in elements][40:60] == rest
    top = trace.operators[second]
    assert top.handed is not None
    assert 0 < top.handed <= top.made
    assert top.parallelism == 2
    assert trace.operators["mix"].inputs == (first, second)


def test_settings_change_neither_stream_nor_states(lines: Path, tmp_path: Path) -> None:
    plan = Plan.from_jsonl([str(lines)]).map(quick).shuffle(seed=1).repeat(2).batch(8)
    settings = Settings({ROWS: 2}, prefetch=5, caches=("map",))
    with open_pipeline(plan) as elements:
        every = [each["n"].tolist() for each in elements]
    running = Profiled(plan, settings, cache=tmp_path / "cache")
    try:
        assert "cache" in str(running.plan)
        first = [next(running)["n"].tolist() for _ in range(100)]
        state = running.get_state()
    finally:
        running.close()
    assert any((tmp_path / "cache").iterdir())
    with open_pipeline(plan, threads=3) as elements:
        elements.set_state(state)
        assert first + [each["n"].tolist() for each in elements] == every


def test_a_cache_where_none_can_be(lines: Path) -> None:
    plan = prepare(Plan.from_jsonl([str(lines)]).map(quick).batch(8))
    with pytest.raises(PipelineError, match=r"behind 'batch'; it can behind: jsonl, map"):
        applied(plan, Settings(caches=("batch",)))
