"""The controller on virtual time: a pipeline whose costs and demand change as planted."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from deltaserve.pipeline.tuning.controller import Controller, StageWindow, Window

PERIOD = 1.0


@dataclass
class Virtual:
    """held: thread seconds per element by stage; gap: the trainer's seconds per element;
    cores: CPU seconds per element may not exceed them (cpu: by stage)."""

    held: dict
    gap: float
    threads: dict
    serial: tuple = ()
    cpu: dict = field(default_factory=dict)
    cores: float = 64

    def window(self):
        slowest = max(self.held[name] / self.threads[name] for name in self.held)
        slowest = max(slowest, sum(self.cpu.values()) / self.cores)
        cycle = max(slowest, self.gap)
        elements = max(1, int(PERIOD / cycle))
        stages = {
            name: StageWindow(self.held[name], self.threads[name], name in self.serial)
            for name in self.held
        }
        stalled = (1 - self.gap / cycle) * PERIOD
        return Window(elements, PERIOD, stalled, self.gap, stages)

    def run(self, controller, seconds):
        """The stall of each period, and every change made."""
        stalls, changes = [], []
        for _ in range(int(seconds / PERIOD)):
            window = self.window()
            stalls.append(window.stall)
            change = controller.step(window)
            changes.append(change)
            self.threads.update(change)
        return stalls, changes


def test_only_the_slowest_stage_is_raised_until_the_demand_is_met():
    pipeline = Virtual({"read": 0.01, "tokenise": 0.08}, 0.012, {"read": 1, "tokenise": 1})
    stalls, changes = pipeline.run(Controller(32), 20)
    assert stalls[-1] <= 0.01
    assert all(set(change) <= {"tokenise"} for change in changes)
    assert pipeline.threads["read"] == 1
    assert 7 <= pipeline.threads["tokenise"] <= 9


def test_drift_tokenising_costs_twice_as_much():
    """The stall is under 2 % again within 60 s; here within 10."""
    pipeline = Virtual({"read": 0.01, "tokenise": 0.04}, 0.01, {"read": 2, "tokenise": 5})
    controller = Controller(32)
    assert max(pipeline.run(controller, 20)[0]) < 0.01
    pipeline.held["tokenise"] *= 2
    stalls, _ = pipeline.run(controller, 60)
    assert stalls[0] > 0.3
    assert max(stalls[10:]) < 0.02


def test_half_the_demand_gives_threads_back_and_then_all_is_quiet():
    pipeline = Virtual({"read": 0.01, "tokenise": 0.08}, 0.01, {"read": 2, "tokenise": 10})
    controller = Controller(32)
    pipeline.run(controller, 20)
    before = pipeline.threads["tokenise"]
    pipeline.gap *= 2
    stalls, changes = pipeline.run(controller, 60)
    assert pipeline.threads["tokenise"] <= before * 0.6
    assert max(stalls) < 0.01
    assert not any(changes[30:])


def test_threads_that_bring_nothing_are_taken_back():
    """The cores are the limit: more threads cannot help, and it does not try for ever."""
    pipeline = Virtual({"parse": 0.05}, 0.005, {"parse": 5}, cpu={"parse": 0.02}, cores=2)
    _, changes = pipeline.run(Controller(32), 60)
    assert pipeline.threads["parse"] == 5
    assert sum(1 for change in changes if change) == 2  # up, and back
    pipeline.cores = 64
    pipeline.cpu["parse"] = 0.0
    pipeline.held["parse"] = 0.03  # it got cheaper: tried again
    stalls, _ = pipeline.run(Controller(32), 20)
    assert stalls[-1] < 0.01


def test_a_serial_stage_that_limits_does_not_raise_others():
    pipeline = Virtual({"map": 0.01, "pack": 0.05}, 0.01, {"map": 4, "pack": 1}, ("pack",))
    _, changes = pipeline.run(Controller(32), 20)
    assert not any(changes)


@pytest.mark.parametrize("gap", [0.0095, 0.0105])
def test_no_swinging_at_the_edge(gap):
    pipeline = Virtual({"map": 0.05}, gap, {"map": 1})
    _, changes = pipeline.run(Controller(32), 60)
    assert not any(changes[15:])


def test_a_period_without_an_element_changes_nothing():
    assert Controller(8).step(Window(0, 1.0, 1.0, 0.1, {"a": StageWindow(1.0, 1)})) == {}


def test_a_rise_is_judged_when_its_threads_have_given_something():
    """Two lists take 2.5 periods, so the period after the rise has the rate of before."""
    controller = Controller(8)

    def look(elements: int, threads: int) -> dict[str, int]:
        stages = {"read": StageWindow(0.4, threads, lot_s=1.25)}
        return controller.step(Window(elements, 1.0, 0.5, 0.1, stages))

    assert look(5, 2) == {"read": 4}
    assert [look(5, 4) for _ in range(3)] == [{}, {}, {}]
    assert look(9, 4) == {"read": 5}  # it brought something, and there is more to be had


def test_a_rise_that_brings_nothing_is_taken_back_after_its_first_lists():
    controller = Controller(8)
    seen = Window(5, 1.0, 0.5, 0.1, {"read": StageWindow(0.4, 2, lot_s=0.75)})
    assert [controller.step(seen) for _ in range(4)] == [{"read": 4}, {}, {}, {"read": 2}]


def test_what_was_ready_is_not_held_against_a_rise():
    """The trainer begins to wait when what was ready runs out; two threads make five a second."""
    controller = Controller(8)
    stages = {"read": StageWindow(0.4, 2)}
    assert controller.step(Window(9, 1.0, 0.1, 0.1, stages)) == {"read": 4}
    stages = {"read": StageWindow(0.4, 4)}
    assert controller.step(Window(8, 1.0, 0.2, 0.1, stages)) == {"read": 5}
