"""Visit ratios, rates and bottlenecks of traces with known service times."""

from __future__ import annotations

import pytest

from deltaserve.errors import PipelineError
from deltaserve.pipeline.trace import Trace, merge
from deltaserve.pipeline.tuning.rates import (
    Lone,
    bottleneck,
    by_cpu,
    by_wall,
    demands,
    root_prefetch,
    visit_ratios,
)
from tests.pipeline.figures import chain


def test_visits_multiply_from_the_root_and_stop_at_a_warm_cache():
    trace = chain(
        {"name": "file", "ratio": 40},
        {"name": "filter", "ratio": 20},
        {"name": "cache", "ratio": 20},
        {"name": "batch"},
    )
    assert visit_ratios(trace) == {"batch": 1, "cache": 20, "filter": 20, "file": 40}
    warm = visit_ratios(trace, cached={"cache"})
    assert warm["cache"] == 20
    assert warm["filter"] == warm["file"] == 0


def test_demands_are_per_root_element():
    trace = chain(
        {"name": "map", "ratio": 8, "cpu": 4, "wait": 2, "queued": 5, "bytes": 100},
        {"name": "batch", "cpu": 1},
    )
    found = demands(trace)["map"]
    assert found.cpu_s == pytest.approx(0.004)
    assert found.waited_s == pytest.approx(0.002)  # waiting for a core is no service
    assert found.rate == pytest.approx(250)
    assert (found.visits, found.element_bytes) == (8, 100)


def test_plumbers_ranking_counts_parallelism():
    trace = chain({"name": "a", "cpu": 8, "threads": 8}, {"name": "b", "cpu": 2})
    assert [each.name for each in by_cpu(trace)] == ["b", "a"]


def test_a_wall_clock_blames_the_victim_of_the_lock_and_the_bottleneck_is_named():
    """Python code holds the lock; batch, which needs little, waits for it most."""
    trace = chain(
        {"name": "parse", "cpu": 6, "wait": 2, "threads": 4},
        {"name": "batch", "op": "batch", "cpu": 0.1, "wait": 40, "serial": True},
        cores=2,
    )
    assert by_wall(trace)[0] == "batch"
    assert bottleneck(trace) == "parse"


def test_waiting_beyond_what_an_operator_does_alone_is_for_the_lock():
    trace = chain(
        {"name": "parse", "cpu": 6, "wait": 2, "threads": 4},
        {"name": "tag", "cpu": 0.2, "wait": 60, "threads": 4},
        cores=2,
    )
    assert by_wall(trace)[0] == "tag"
    assert bottleneck(trace) == "tag"  # it might be a network
    assert bottleneck(trace, lone={"tag": Lone(waited_s=1e-5)}) == "parse"


def test_a_stage_that_waits_for_the_network_is_named():
    trace = chain({"name": "fetch", "cpu": 0.1, "wait": 20}, {"name": "parse", "cpu": 3})
    assert by_cpu(trace)[0].name == "parse"  # cores alone cannot tell
    assert bottleneck(trace) == "fetch"


def test_work_without_the_lock_is_limited_by_cores():
    trace = chain({"name": "hash", "cpu": 6, "threads": 8}, {"name": "parse", "cpu": 2}, cores=2)
    assert bottleneck(trace, lone={"hash": Lone(gil=0.05)}) == "hash"


def test_root_prefetch_covers_what_is_not_yet_overlapped():
    trace = chain({"name": "a", "cpu": 4}, {"name": "b", "cpu": 4}, wall_ms=800)
    assert root_prefetch(trace) == 1


def test_a_trace_without_an_element_says_so():
    with pytest.raises(PipelineError, match="too short"):
        visit_ratios(chain({"name": "a", "cpu": 4}, elements=0))


def test_traces_survive_the_disk_and_others_are_refused(tmp_path):
    trace = chain({"name": "a", "cpu": 4}, {"name": "b", "cpu": 4})
    trace.write(tmp_path / "trace.json")
    assert Trace.read(tmp_path / "trace.json") == trace
    for text in ("{", '{"format": "other"}', "[]"):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(PipelineError, match="not a trace"):
            Trace.read(tmp_path / "wrong.json")
    with pytest.raises(PipelineError, match="No such file"):
        Trace.read(tmp_path / "missing.json")


def test_processes_add_up():
    one = chain({"name": "a", "cpu": 4, "bytes": 10}).operators["a"]
    both = merge([one, one])
    assert (both.made, both.cpu_ns, both.bytes) == (200, 2 * one.cpu_ns, 2 * one.bytes)
    assert both.parallelism == one.parallelism
