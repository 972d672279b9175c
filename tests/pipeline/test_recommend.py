"""Advice from traces with known costs, and its picture."""

from __future__ import annotations

from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from deltaserve.pipeline import consumption
from deltaserve.pipeline.tuning.cacheplace import Nature
from deltaserve.pipeline.tuning.picture import draw, write
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.rates import Lone
from deltaserve.pipeline.tuning.recommend import advise
from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.tune import run_traced, tune
from tests.pipeline.figures import chain

NATURES = {
    "read": Nature(rows=1000),
    "tokenise": Nature(("read",)),
    "noise": Nature(("tokenise",), random=True),
    "pack": Nature(("noise",)),
}


def text():
    return chain(
        {"name": "read", "cpu": 1, "wait": 9, "ratio": 10, "bytes": 100},
        {"name": "tokenise", "cpu": 8, "ratio": 10, "bytes": 400},
        {"name": "noise", "cpu": 1, "ratio": 10, "bytes": 400},
        {"name": "pack", "cpu": 0.5, "serial": True, "bytes": 4000},
        cores=4,
    )


def test_threads_follow_costs():
    advice = advise(text(), Resources(cores=4, locked=False))
    assert advice.bottleneck == "read"
    assert advice.allocation.rate == pytest.approx(4 / 0.0105)
    assert advice.allocation.threads["read"] > advice.allocation.threads["noise"]
    assert advice.caches == ()  # one epoch: nobody would read it


def test_a_second_epoch_makes_a_cache_pay_and_frees_the_cores():
    advice = advise(text(), Resources(cores=4, memory=1e9, locked=False), natures=NATURES, epochs=2)
    assert [each.name for each in advice.caches] == ["tokenise"]
    assert {each.name: each.why for each in advice.refused} == {
        "noise": "noise is random",
        "pack": "noise is random",
    }
    assert advice.warm.rate > 1500
    assert advice.allocation.rate < 400  # until it is filled


@pytest.fixture
def clock(monkeypatch):
    """What consumers go by, in seconds."""
    now = SimpleNamespace(s=0.0)
    timer = SimpleNamespace(perf_counter_ns=lambda: round(now.s * 1e9))
    monkeypatch.setattr(consumption, "time", timer)
    return now


class Runs:
    """A pipeline whose n-th element comes after ``waits(n)`` seconds, and that has settled once
    so many are out; ``rate`` is what its trace says, if given."""

    def __init__(self, clock, waits=lambda number: 0.01, unsettled=0, rate=None):
        self.clock, self.waits, self.unsettled, self.rate = clock, waits, unsettled, rate
        self.consumed, self.given = consumption.Consumption(), 0

    def __next__(self):
        self.consumed.asked()
        self.clock.s += self.waits(self.given)
        self.given += 1
        self.consumed.given()
        return {}

    def settled(self):
        return self.given >= self.unsettled

    def close(self):
        pass

    def trace(self):
        wall, elements = self.consumed.wall_ns / 1e6, self.consumed.elements
        if self.rate is not None:
            wall, elements = 1000.0, self.rate
        return chain({"name": "read", "cpu": 1}, elements=elements, wall_ms=wall, cores=4)


class Two(Runs):
    """A stage that waits, and one beside it that does not."""

    def __init__(self, clock, rate):
        super().__init__(clock, rate=rate)

    def trace(self):
        slow, quick = {"name": "read", "cpu": 1, "wait": 99}, {"name": "tokenise", "cpu": 1}
        return chain(slow, quick, elements=self.rate, wall_ms=1000.0, cores=2)


class Loading(Runs):
    def trace(self):
        given = self.consumed.elements
        operator = {"name": "read", "cpu": (1000 + given) / max(1, given)}
        return chain(operator, elements=given, wall_ms=self.consumed.wall_ns / 1e6)


def tuned(clock, rate):
    """From sixteen threads; rate: of so many threads. Four are advised."""
    return tune(
        lambda settings: Runs(clock, rate=rate(settings.workers("read"))),
        Settings({"read": 16}),
        ["read"],
        Resources(cores=4, locked=False),
        seconds=0.1,
    )


@pytest.mark.parametrize(
    ("rates", "threads"),
    [({16: 200, 1: 224, 4: 193}, 1), ({16: 200, 1: 224, 4: 300}, 4), ({16: 400, 1: 9, 4: 9}, 16)],
)
def test_the_fastest_is_kept(clock, rates, threads):
    found = tuned(clock, rates.__getitem__)
    assert found.settings.threads == {"read": threads}
    assert found.rate == rates[threads]
    assert len(found.traces) == 3


@pytest.mark.parametrize("later", [[300], [100, 300], [100, 100, 300]])
def test_a_bad_moment_during_a_trace_does_not_decide(clock, later):
    """The advised setting is traced while the machine has other work."""
    four = iter([50, *later])
    found = tuned(clock, lambda threads: next(four) if threads == 4 else 200)
    assert found.settings.threads == {"read": 4}


def test_as_many_threads_as_cores_are_tried_too(clock):
    """Two are advised to what is taken to hold the lock all the time."""
    found = tune(
        lambda settings: Runs(clock, rate=300 if settings.workers("read") == 4 else 100),
        Settings({"read": 1}),
        ["read"],
        Resources(cores=4),
        seconds=0.1,
    )
    assert found.settings.threads == {"read": 4}
    assert found.rate == 300


@pytest.mark.parametrize(("faster", "processes"), [(1.1, 2), (1.0, 0)])
def test_processes_are_tried_where_the_program_cannot_tell(clock, faster, processes):
    """Both have the same bound; the trial says which is faster."""
    found = tune(
        lambda settings: Runs(clock, rate=200 * (faster if settings.processes else 1)),
        Settings({"read": 1}),
        ["read"],
        Resources(cores=2, max_processes=2),
        seconds=0.1,
        lone={"read": Lone(gil=0.0, waited_s=0.0)},
    )
    assert found.advice.allocation.processes == 0
    assert found.settings.processes == processes
    assert [each.settings.processes for each in found.tried] == [0, 2]


def test_processes_are_not_tried_where_they_must_be_slower(clock):
    """Two processes have one thread each for what waits."""
    trace = chain({"name": "read", "cpu": 1, "wait": 9}, cores=2)
    lone = {"read": Lone(gil=0.0)}
    assert advise(trace, Resources(cores=2, max_processes=2), lone=lone).other is None


def test_stages_beside_one_that_waits_are_tried_with_as_many_threads(clock):
    def open_with(settings):
        return Two(clock, 130 if settings.workers("tokenise") == 8 else 100)

    found = tune(open_with, Settings(), ["read", "tokenise"], Resources(2, max_threads=8))
    assert found.advice.allocation.threads == {"read": 8, "tokenise": 2}
    assert found.settings.threads == {"read": 8, "tokenise": 8}


def test_costs_are_those_of_the_steady_state(clock):
    """The first element loads a tokenizer for a second."""
    trace = run_traced(Loading(clock), seconds=0.5)
    assert trace.operators["read"].cpu_ns / trace.operators["read"].made == pytest.approx(1e6)


def test_what_was_made_before_anybody_asked_is_no_rate(clock):
    stocked = Runs(clock, lambda number: 0.01 if number >= 100 else 0.003, unsettled=100)
    assert run_traced(stocked, seconds=0.2).rate == pytest.approx(100)


@pytest.mark.parametrize("unsettled", [0, 21, 25, 29])
def test_bursts_count_whole(clock, unsettled):
    bursts = Runs(clock, lambda number: 0.0 if number % 10 else 0.1, unsettled)
    assert run_traced(bursts, seconds=0.25).rate == pytest.approx(100)


def test_a_pipeline_that_does_not_settle_is_measured_all_the_same(clock):
    assert run_traced(Runs(clock, unsettled=10**9), seconds=0.2).rate == pytest.approx(100)


def test_the_picture_is_one_valid_file(tmp_path):
    trace = text()
    advice = advise(trace, Resources(cores=4, locked=False))
    write(tmp_path / "trace.svg", trace, advice)
    root = ElementTree.parse(tmp_path / "trace.svg").getroot()
    words = " ".join(each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "read limits" in words
    assert "http" not in draw(trace, advice).replace("http://www.w3.org/2000/svg", "")
