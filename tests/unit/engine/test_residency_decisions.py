"""Small decisions of residency, one at a time: without files, layers and threads."""

from __future__ import annotations

import pytest

from deltaserve.engine.limits import Limits
from deltaserve.engine.probe import Savings
from deltaserve.engine.versions import State
from deltaserve.errors import ConfigError
from tests.residency_helpers import Bench, FakeParts

LIMITS = Limits(100, 0, attach_s=1.0)


def make(*names: str, size: int = 40, limits: Limits = LIMITS) -> Bench:
    bench = Bench(limits)
    for name in names:
        bench.residency.register(name, f"/{name}/{size}", load=False)
    return bench


def turn(bench: Bench, seconds: float = 0.1) -> None:
    bench.clock.now += seconds
    bench.loader.finish()
    bench.step()
    bench.check()


def load(bench: Bench) -> None:
    for _ in range(4):
        turn(bench, 0.01)


def state(bench: Bench, name: str) -> State:
    return bench.residency.current(name).state


def test_the_queue_decides_who_is_loaded_first() -> None:
    bench = make("a", "b", "c")
    for name in ("c", "b", "a"):
        bench.request(name)
    bench.step()
    assert [job.version.name for job, _ in bench.loader.jobs] == ["c", "b"]


def test_what_was_just_loaded_is_not_evicted_at_once() -> None:
    bench = make("a", "b", "c")
    bench.residency.pin("a", True)
    for name in ("a", "b"):
        bench.request(name)
    load(bench)
    for seq in list(bench.running):
        bench.end(seq)
    bench.request("c")
    turn(bench, 0.01)
    assert state(bench, "b") is State.READY
    turn(bench, LIMITS.min_residency_s)
    assert state(bench, "b") is State.REGISTERED
    assert state(bench, "a") is State.READY  # pinned


def test_often_used_deltas_stay() -> None:
    bench = make("a", "b", "c")
    for name in ("a", "a", "a", "b"):
        bench.request(name)
    load(bench)
    for seq in list(bench.running):
        bench.end(seq)
    bench.request("c")
    turn(bench, 1.0)
    assert (state(bench, "a"), state(bench, "b")) == (State.READY, State.REGISTERED)


def test_a_starved_delta_has_another_drained() -> None:
    bench = make("a", "b", "c")
    for name in ("a", "b"):
        bench.request(name)
    load(bench)
    assert len(bench.running) == 2
    bench.request("c")
    turn(bench, 0.5)
    assert State.DRAINING not in (state(bench, "a"), state(bench, "b"))
    turn(bench, LIMITS.starvation_s)
    assert state(bench, "a") is State.DRAINING
    late = bench.request("a")
    turn(bench)
    assert late in bench.waiting
    bench.end(bench.running[0])
    load(bench)
    assert state(bench, "c") is State.READY


def test_draining_ends_when_nobody_starves_any_more() -> None:
    bench = make("a", "b", "c")
    for name in ("a", "b"):
        bench.request(name)
    load(bench)
    starved = bench.request("c")
    assert starved is not None
    turn(bench, 2.0)
    assert state(bench, "a") is State.DRAINING
    bench.end(starved)
    turn(bench)
    assert state(bench, "a") is State.READY


def test_while_the_device_is_full_files_are_read_ahead() -> None:
    bench = make("a", "b", "c", limits=Limits(100, 1000, attach_s=1.0))
    for name in ("a", "b", "c"):
        bench.request(name)
    for _ in range(4):
        turn(bench, 0.05)
    version = bench.residency.current("c")
    assert (version.state, version.tier) == (State.REGISTERED, "host")


def test_in_one_memory_a_delta_comes_back_without_a_job() -> None:
    limits = Limits(100, 1000, attach_s=1.0)
    bench = Bench(limits, parts=FakeParts(one_memory=True))
    for name in ("a", "b", "c"):
        bench.residency.register(name, f"/{name}/40", load=False)
    for name in ("a", "b"):
        bench.request(name)
    load(bench)
    for seq in list(bench.running):
        bench.end(seq)
    bench.request("c")
    for _ in range(4):
        turn(bench, limits.min_residency_s)
    evicted = next(n for n in ("a", "b") if state(bench, n) is State.REGISTERED)
    bench.end(bench.running[0])
    bench.clock.now += limits.min_residency_s
    bench.request(evicted)
    for _ in range(2):  # a turn decides, the next attaches
        bench.step()
        bench.check()
    assert not bench.loader.jobs
    assert state(bench, evicted) is State.READY


def test_what_only_had_to_be_attached_gives_way_sooner() -> None:
    limits = Limits(40, 1000, attach_s=1.0)
    bench = Bench(limits, parts=FakeParts(one_memory=True))
    for name in ("a", "b"):
        bench.residency.register(name, f"/{name}/40", load=False)
    bench.request("a")
    load(bench)
    for name in ("b", "a"):  # the second time without work
        for seq in list(bench.running):
            bench.end(seq)
        bench.clock.now += limits.min_residency_s
        bench.request(name)
        load(bench)
        assert state(bench, name) is State.READY
    for seq in list(bench.running):
        bench.end(seq)
    bench.request("b")
    turn(bench, limits.min_attached_s / 2)
    assert state(bench, "a") is State.READY
    turn(bench, limits.min_attached_s / 2)
    turn(bench, 0.001)
    assert state(bench, "a") is State.REGISTERED


def test_pins_leave_room_for_the_others() -> None:
    bench = make("a", "b", "c")
    bench.residency.pin("a", True)
    with pytest.raises(ConfigError, match="pinned deltas take 80 and the largest of the others 40"):
        bench.residency.pin("b", True)
    with pytest.raises(ConfigError, match=r"'d' \(70 bytes\) does not fit"):
        bench.residency.register("d", "/d/70")
    bench.residency.pin("a", False)
    bench.residency.pin("b", True)


def test_a_rollback_during_a_swap_gives_the_new_version_up() -> None:
    bench = make("a")
    bench.request("a")
    turn(bench)
    bench.residency.register("a", "/a/41")
    bench.residency.rollback("a")
    for _ in range(3):
        turn(bench)
    assert bench.residency.current("a").number == 1
    assert bench.residency.device.used_bytes == 40
    with pytest.raises(ConfigError, match="no earlier version"):
        bench.residency.rollback("a")


def test_the_delta_that_saves_most_takes_the_memory_of_another() -> None:
    bench = make("a", "b", size=20, limits=Limits(100, 0, 80, attach_s=1.0))
    merger = bench.residency.merger
    for name in ("a", "b"):
        bench.request(name)
    load(bench)
    a, b = (bench.residency.current(name) for name in "ab")

    def traffic(rows_a: int, rows_b: int) -> None:
        for _ in range(80):
            for _ in range(20):
                merger.count(a, rows_a)
                merger.count(b, rows_b)
            turn(bench, 0.5)

    traffic(8, 1)
    assert (a.merged is not None, b.merged is not None) == (True, False)
    traffic(7, 8)  # hardly better
    assert (a.merged is not None, b.merged is not None) == (True, False)
    traffic(1, 8)
    assert (a.merged is not None, b.merged is not None) == (False, True)
    assert merger.used_bytes == 80


def test_prompts_of_one_moment_are_not_traffic_that_goes_on() -> None:
    bench = make("a", "b", size=20, limits=Limits(100, 0, 80, attach_s=1.0))
    merger = bench.residency.merger
    for name in ("a", "b"):
        bench.request(name)
    load(bench)
    a, b = (bench.residency.current(name) for name in "ab")
    merger.merge_seconds = 0.1
    for _ in range(3):
        merger.count(a, 8)  # 24 ms in half a second, and never again
    for number in range(40):
        turn(bench, 0.5)
        if number % 2:
            merger.count(b, 8)  # 8 ms each second, which pays within 20
    assert (a.merged is not None, b.merged is not None) == (False, True)


def test_savings_between_measurements_lie_on_a_line() -> None:
    savings = Savings((1, 8, 32), (1.0, 8.0, 20.0))
    assert [savings.of(rows) for rows in (1, 4, 20, 99)] == [1.0, 4.0, 14.0, 20.0]
