"""Settings in turns: the clearly fastest wins, and who is far behind stops."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.trial import CLEARLY, TURNS, fastest, side_by_side

ADVISED, OTHER, THIRD = Settings({"rows": 2}), Settings(processes=2), Settings({"rows": 16})


class Machine:
    """The n-th time that a setting is measured it has the n-th of its rates."""

    def __init__(self, rates: dict[str, Sequence[float]]) -> None:
        self.rates = {name: list(each) for name, each in rates.items()}

    def __call__(self, settings: Settings) -> float:
        return self.rates[str(settings)].pop(0)


def tried(*rates: Sequence[float]):
    settings = (ADVISED, OTHER, THIRD)[: len(rates)]
    machine = Machine({str(each): found for each, found in zip(settings, rates, strict=True)})
    return side_by_side(settings, machine), machine


@pytest.mark.parametrize(
    ("other", "chosen"),
    [([110, 108, 109], OTHER), ([102, 101, 102], ADVISED), ([96, 97, 98], ADVISED)],
)
def test_the_advice_is_kept_unless_another_is_clearly_faster(other, chosen) -> None:
    found, _ = tried([100, 100, 100], other)
    assert fastest(found).settings == chosen


def test_one_good_turn_does_not_decide() -> None:
    found, _ = tried([100, 100, 100], [130, 101, 100])
    assert fastest(found).settings == ADVISED


def test_shares_are_those_of_a_turn() -> None:
    """The machine is half as fast in the second turn, for all."""
    found, _ = tried([100, 50, 100], [108, 54, 108])
    assert found[1].share == pytest.approx(1.08)
    assert found[1].rate == 108


def test_who_is_far_behind_takes_no_further_turn() -> None:
    found, machine = tried([100, 100, 100], [110, 110, 110], [40, 500, 500])
    assert machine.rates[str(THIRD)] == [500, 500]
    assert [each.finished for each in found] == [True, True, False]
    assert fastest(found).settings == OTHER


def test_the_advice_alone_is_measured_once() -> None:
    found, machine = tried([100, 1, 1])
    assert fastest(found).rate == 100
    assert machine.rates[str(ADVISED)] == [1, 1]


def test_turns_end_when_nobody_is_left_beside_the_advice() -> None:
    _, machine = tried([100, 1, 1], [50, 1, 1])
    assert machine.rates[str(ADVISED)] == [1, 1]


@given(
    rates=st.lists(st.floats(80, 120), min_size=3, max_size=3),
    free=st.lists(st.floats(0.2, 1), min_size=TURNS, max_size=TURNS),
)
def test_what_else_the_machine_does_decides_nothing(rates, free) -> None:
    found, _ = tried(*([rate * share for share in free] for rate in rates))
    best = max(range(3), key=lambda n: (rates[n], -n))
    if rates[best] > 1.0001 * CLEARLY * rates[0]:
        assert fastest(found) is found[best]
    elif rates[best] < 0.9999 * CLEARLY * rates[0]:
        assert fastest(found) is found[0]
