"""The linear program against optima worked out by hand."""

from __future__ import annotations

import pytest

from deltaserve.errors import PipelineError
from deltaserve.pipeline.tuning.program import (
    Resources,
    allocate,
    allocations,
    best_of,
    fit_bandwidth,
    other_way,
)
from deltaserve.pipeline.tuning.rates import Demand


def plan(*operators):
    return {o.name: o for o in operators}


def op(name, cpu_ms=0.0, wait_ms=0.0, *, gil=0.0, serial=False, stage=None, **more):
    return Demand(
        name, "map", stage or name, 1.0, cpu_ms / 1e3, wait_ms / 1e3, serial, gil=gil, **more
    )


def test_cores_are_shared_in_proportion():
    found = allocate(plan(op("a", 6), op("b", 2)), Resources(cores=8))
    assert found.rate == pytest.approx(1000)
    assert found.exact == pytest.approx({"a": 6, "b": 2}, rel=1e-4)
    assert found.limits == ("cores",)


def test_where_the_lock_hardly_binds_processes_are_worth_a_trial():
    machine = Resources(cores=2, max_processes=2, locked=True)
    options = allocations(plan(op("work", 2, gil=0.5)), machine)
    chosen = best_of(options)
    assert chosen.processes == 0
    other = other_way(options, chosen)
    assert other is not None
    assert other.processes == 2


def test_where_the_lock_binds_threads_are_not():
    machine = Resources(cores=4, max_processes=4, locked=True)
    options = allocations(plan(op("work", 2, gil=1.0)), machine)
    chosen = best_of(options)
    assert chosen.processes > 1
    assert other_way(options, chosen) is None


def test_serial_operators_of_one_thread_add_up():
    both = plan(
        op("pack", 2, serial=True, stage="tail"),
        op("batch", 3, serial=True, stage="tail"),
        op("map", 4),
    )
    found = allocate(both, Resources(cores=8))
    assert found.rate == pytest.approx(200)
    assert found.limits == ("stage tail",)
    assert found.threads["tail"] == 1


def test_waiting_needs_threads_not_cores():
    found = allocate(plan(op("fetch", 0.5, 49.5), op("map", 4.5)), Resources(cores=2))
    assert found.rate == pytest.approx(400)
    assert found.exact["fetch"] == pytest.approx(20, rel=1e-4)
    assert 20 <= found.threads["fetch"] <= 26


def test_threads_to_spare_only_where_they_could_run():
    busy = allocate(plan(op("native", 8)), Resources(cores=4))
    assert busy.threads["native"] == 4
    waiting = allocate(plan(op("fetch", 4, 12)), Resources(cores=4))
    assert waiting.threads["fetch"] == 19  # 16, and a quarter of the 12 that wait


def test_a_cheap_stage_beside_a_dear_one_is_not_starved():
    """95 to 1: exact shares would leave the cheap one with one thread at its limit."""
    found = allocate(plan(op("dear", 95), op("cheap", 1)), Resources(cores=96, max_threads=200))
    assert found.threads["cheap"] >= 2
    assert found.threads["dear"] >= 95


def test_the_lock_limits_threads_and_processes_lift_it():
    both = plan(op("python", 8, gil=1.0), op("native", 2, gil=0.0))
    one = allocate(both, Resources(cores=8))
    assert one.rate == pytest.approx(125)
    assert one.limits == ("gil",)
    many = allocate(both, Resources(cores=8, max_processes=8))
    assert many.rate == pytest.approx(800, rel=0.04)
    assert many.processes == 7  # the fewest that reach 97 % of 800
    free = allocate(both, Resources(cores=8, locked=False))
    assert free.rate == pytest.approx(800)


def test_processes_must_fit_the_memory():
    both = plan(op("python", 8, gil=1.0))
    found = allocate(both, Resources(8, memory=2.5e9, max_processes=8, process_bytes=1e9))
    assert found.processes == 2


def test_a_demand_is_met_with_the_fewest_threads():
    found = allocate(plan(op("a", 6), op("b", 2)), Resources(cores=64, demand=500))
    assert found.rate == pytest.approx(500)
    assert found.exact == pytest.approx({"a": 3, "b": 1}, rel=1e-4)
    assert found.limits == ("demand",)


def test_the_disk_binds():
    found = allocate(
        plan(op("read", 1, read_bytes=1e6), op("map", 1)),
        Resources(cores=64, bandwidth={"read": [(40e6, 0.0), (0.0, 100e6)]}),
    )
    assert found.rate == pytest.approx(100)
    assert found.exact["read"] == pytest.approx(2.5, rel=1e-3)
    assert "disk of read" in found.limits


def test_memory_bounds_the_threads():
    found = plan(op("map", 0, 100, element_bytes=5e6))
    assert allocate(found, Resources(2, memory=40e6)).threads["map"] == 4
    with pytest.raises(PipelineError, match="does not fit"):
        allocate(found, Resources(2, memory=-1.0))


def test_bandwidth_is_a_rising_and_a_level_line():
    lines = fit_bandwidth([1, 2, 4, 8, 16], [50e6, 99e6, 180e6, 182e6, 179e6])
    rising, level = lines
    assert rising[0] == pytest.approx(50e6, rel=0.02)
    assert level[1] == pytest.approx(180e6, rel=0.02)
    with pytest.raises(PipelineError, match="two or more"):
        fit_bandwidth([1], [50e6])


def test_fixed_stages_stay():
    found = allocate(plan(op("a", 6), op("b", 2)), Resources(cores=64, fixed={"a": 3}))
    assert found.threads["a"] == 3
    assert found.rate == pytest.approx(500)
