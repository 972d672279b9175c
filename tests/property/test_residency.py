"""Whatever is registered, asked for and goes wrong: memory holds, and every request ends."""

from __future__ import annotations

import contextlib
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.engine.limits import Limits
from deltaserve.errors import ConfigError, UnknownModelError
from tests.residency_helpers import Bench, FakeParts

NAMES = "abcdef"
name = st.sampled_from(NAMES)
size = st.sampled_from([5, 20, 30, 40])

action = st.one_of(
    st.tuples(st.just("register"), name, size, st.sampled_from([False, False, True])),
    st.tuples(st.just("unregister"), name),
    st.tuples(st.just("pin"), name, st.booleans()),
    st.tuples(st.just("rollback"), name),
    st.tuples(st.just("request"), name),
    st.tuples(st.just("request"), name),
    st.tuples(st.just("request"), name),
    st.tuples(st.just("end"), st.integers(0, 9)),
    st.tuples(st.just("abort"), st.integers(0, 9)),
    st.tuples(st.just("preempt"), st.integers(0, 9)),
    st.tuples(st.just("finish"), st.integers(0, 3)),
    st.tuples(st.just("break"), name, size),
    *[st.tuples(st.just("turn"), st.sampled_from([0.01, 0.3, 1.5]), st.booleans())] * 5,
)
LIMITS = Limits(100, 60, 200, attach_s=1.0)


def perform(bench: Bench, what: tuple) -> None:
    residency = bench.residency
    match what:
        case "register", name, size, pinned:
            residency.register(name, f"/{name}/{size}", pinned=pinned)
        case "unregister", name:
            residency.unregister(name)
        case "pin", name, pinned:
            residency.pin(name, pinned)
        case "rollback", name:
            residency.rollback(name)
        case "request", name:
            bench.request(name)
        case "end", index if bench.running:
            bench.end(bench.running[index % len(bench.running)])
        case "abort", index if bench.waiting:
            bench.end(bench.waiting[index % len(bench.waiting)])
        case "preempt", index if bench.running:
            bench.preempt(bench.running[index % len(bench.running)])
        case "finish", index:
            bench.loader.finish(index)
        case "break", name, size:
            bench.parts.bad.add(f"/{name}/{size}")
        case "turn", seconds, loads:
            bench.clock.now += seconds
            residency.count_rows({seq.slot: 3 for seq in bench.running})
            if loads:
                bench.loader.finish()
            bench.step()


def settle(bench: Bench) -> None:
    """Requests run for a few steps each and end; nothing new comes."""
    for _ in range(600):
        if not bench.waiting and not bench.running and bench.residency.idle:
            return
        bench.clock.now += 0.1
        bench.loader.finish()
        bench.step()
        bench.check()
        if bench.running:
            bench.end(bench.running[0])
    raise AssertionError("somebody waits for ever")


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(size, min_size=6, max_size=6),
    actions=st.lists(action, min_size=40, max_size=150),
    host=st.sampled_from([0, 60, 500]),
    one_memory=st.booleans(),
)
def test_memory_holds_and_every_request_ends(
    sizes: list[int], actions: list[tuple], host: int, one_memory: bool
) -> None:
    bench = Bench(replace(LIMITS, host_bytes=host), parts=FakeParts(one_memory=one_memory))
    for name, first in zip(NAMES, sizes, strict=True):
        bench.residency.register(name, f"/{name}/{first}", load=False)
    for what in actions:
        with contextlib.suppress(UnknownModelError, ConfigError):
            perform(bench, what)
        bench.check()
    settle(bench)
    assert len(bench.ended) == bench.number
    for name in list(bench.residency.catalogue.served):
        bench.residency.unregister(name)
    settle(bench)
    assert not bench.parts.layers
    assert bench.residency.device.used_bytes == bench.residency.host.used_bytes == 0
    assert bench.residency.merger.used_bytes == 0
    assert not bench.residency.catalogue.left


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(20, 50), min_size=4, max_size=8),
    busy=st.integers(1, 3),
    length=st.integers(1, 30),
)
def test_nobody_starves_behind_resident_deltas(sizes: list[int], busy: int, length: int) -> None:
    """Some deltas are asked for without end and would keep the memory; the others come once."""
    bench = Bench(LIMITS, max_running=6)
    names = [f"d{i}" for i in range(len(sizes))]
    for name, size in zip(names, sizes, strict=True):
        bench.residency.register(name, f"/{name}/{size}", load=False)
    ages: dict[str, int] = {}
    once = [bench.request(name) for name in names[busy:]]
    for _ in range(1500):
        for name in names[:busy]:
            if sum(seq.request.model == name for seq in (*bench.waiting, *bench.running)) < 2:
                bench.request(name)
        bench.clock.now += 0.05
        bench.loader.finish()
        bench.step()
        bench.check()
        for seq in list(bench.running):
            request_id = seq.request.request_id
            ages[request_id] = ages.get(request_id, 0) + 1
            if ages[request_id] >= length:
                bench.end(seq)
        if all(seq and seq.request.request_id in bench.ended for seq in once):
            return
    raise AssertionError("a delta starved")
