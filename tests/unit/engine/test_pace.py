"""Loading threads rest as much as the share of a core that they are given asks."""

from __future__ import annotations

import pytest

from deltaserve.engine import pace as module
from deltaserve.engine.pace import LEAST_SHARE, LONGEST_REST_S, Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """now: CPU seconds of the thread; slept: what was asked for in all."""
    seen = {"now": 0.0, "slept": 0.0}
    monkeypatch.setattr(module.time, "thread_time", lambda: seen["now"])
    monkeypatch.setattr(
        module.time, "sleep", lambda s: seen.__setitem__("slept", seen["slept"] + s)
    )
    return seen


@pytest.mark.parametrize(
    ("decoding", "waiting", "share"),
    [(0, 0, 1.0), (0, 5, 1.0), (8, 0, LEAST_SHARE), (8, 8, 0.5), (1, 31, 31 / 32)],
)
def test_a_core_is_divided_by_heads(decoding: int, waiting: int, share: float) -> None:
    pace = Pace()
    pace.divide(decoding, waiting)
    assert pace.share == pytest.approx(share)


@pytest.mark.parametrize(
    ("decoding", "gaining", "share"),
    [(0, 0, 1.0), (32, 0, LEAST_SHARE), (32, 8, 0.25), (32, 32, 1.0)],
)
def test_a_merge_gets_the_share_of_those_who_gain(
    decoding: int, gaining: int, share: float, clock: dict[str, float]
) -> None:
    pace = Pace()
    pace.divide(decoding, 0, gaining)
    pace.rest_merging()
    for _ in range(10):
        clock["now"] += 0.01
        pace.rest_merging()
    assert clock["now"] / (clock["now"] + clock["slept"]) == pytest.approx(share)


def test_nobody_rests_while_nobody_decodes(clock: dict[str, float]) -> None:
    pace = Pace()
    for _ in range(3):
        clock["now"] += 0.01
        pace.rest()
    assert clock["slept"] == 0


def test_work_and_rest_make_the_share(clock: dict[str, float]) -> None:
    pace = Pace()
    pace.divide(8, 2)
    pace.rest()
    for _ in range(10):
        clock["now"] += 0.01
        pace.rest()
    assert clock["now"] / (clock["now"] + clock["slept"]) == pytest.approx(0.2)


def test_what_was_worked_at_full_speed_is_not_made_up_for(clock: dict[str, float]) -> None:
    pace = Pace()
    clock["now"] = 5.0
    pace.rest()
    pace.divide(8, 0)
    pace.rest()
    assert clock["slept"] == 0
    clock["now"] += 60.0
    pace.rest()
    assert clock["slept"] == LONGEST_REST_S
