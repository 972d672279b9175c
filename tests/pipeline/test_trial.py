"""Settings that take turns on one pipeline: who is kept, and who is given up."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.trial import CLEARLY, TURNS, fastest, side_by_side

SETTINGS = [Settings({"work": n}, 0) for n in (1, 2, 4)]


class Machine:
    """Rates of each setting, and how much of the machine there is at each turn."""

    def __init__(self, rates: list[float], free: list[float]) -> None:
        self.rates = dict(zip([1, 2, 4], rates, strict=True))
        self.free = free
        self.asked: list[int] = []

    def __call__(self, settings: Settings) -> float:
        workers = settings.threads["work"]
        turn = Counter(self.asked)[workers]
        self.asked.append(workers)
        return self.rates[workers] * self.free[turn]


def test_who_falls_far_behind_takes_no_further_turn() -> None:
    machine = Machine([100, 90, 50], [1.0] * TURNS)
    tried = side_by_side(SETTINGS, machine)
    assert Counter(machine.asked) == {1: TURNS, 2: TURNS, 4: 1}
    assert [each.finished for each in tried] == [True, True, False]
    assert [each.share for each in tried] == [1.0, 0.9, 0.5]
    assert fastest(tried) is tried[0]


def test_one_turn_is_enough_where_nobody_keeps_up_with_the_first() -> None:
    machine = Machine([100, 10, 10], [1.0] * TURNS)
    assert fastest(side_by_side(SETTINGS, machine)).settings is SETTINGS[0]
    assert len(machine.asked) == 3


def test_the_first_is_measured_as_long_as_another_runs() -> None:
    machine = Machine([10, 100, 90], [1.0] * TURNS)
    tried = side_by_side(SETTINGS, machine)
    assert Counter(machine.asked) == dict.fromkeys((1, 2, 4), TURNS)
    assert fastest(tried).settings is SETTINGS[1]


def test_nobody_is_always_the_first() -> None:
    machine = Machine([100, 100, 100], [1.0] * TURNS)
    side_by_side(SETTINGS, machine)
    assert machine.asked == [1, 2, 4, 4, 2, 1, 1, 2, 4]


def test_alone_it_is_measured_once() -> None:
    machine = Machine([100, 0, 0], [1.0])
    (only,) = side_by_side(SETTINGS[:1], machine)
    assert (only.rate, only.share, only.finished) == (100, 1.0, True)


@given(
    rates=st.lists(st.floats(80, 120), min_size=3, max_size=3),
    free=st.lists(st.floats(0.2, 1), min_size=TURNS, max_size=TURNS),
)
def test_what_else_the_machine_does_decides_nothing(rates: list[float], free: list[float]) -> None:
    tried = side_by_side(SETTINGS, Machine(rates, free))
    best = max(range(3), key=lambda n: (rates[n], -n))
    clearly = rates[best] > 1.0001 * CLEARLY * rates[0]
    if clearly:
        assert fastest(tried).settings is SETTINGS[best]
    elif rates[best] < 0.9999 * CLEARLY * rates[0]:
        assert fastest(tried) is tried[0]
