"""Growth of the server's memory: a leak is seen, and the processes of its start are not one."""

from __future__ import annotations

import time
from typing import Any

import pytest

from deltaserve.bench.load.scrape import RSS, Series, summarise
from tests.bench.fake_server import Behaviour
from tests.bench.running import run, steady

LIMIT = {"metric": f"server.series.{RSS}.growth", "max": 0.1}


@pytest.mark.parametrize(
    ("leak", "settle", "passed"), [(0, 1, True), (0, 0, False), (50, 1, False)]
)
def test_a_leak_is_told_from_a_start(leak, settle, passed):
    """A server that takes 100 MB at first, 150 from 0.7 s on, and ``leak`` MB in each second."""
    behaviour = Behaviour(metrics="begins")
    began: list[float] = []

    def remember(body: dict[str, Any], key: str) -> float:
        if not began and body["max_tokens"] == 2:
            began.append(time.monotonic())
        seconds = time.monotonic() - began[0] if began else 0.0
        size = 100 + 50 * (seconds > 0.7) + leak * seconds
        behaviour.metrics = f"{RSS} {1e6 * size}"
        return 0.0

    behaviour.first = remember
    content = {"scrape": 0.1, "settle": settle, "thresholds": [LIMIT]}
    result = run(behaviour, **steady(25, 75), output=2, **content)
    assert [each["passed"] for each in result["thresholds"]] == [passed]


def test_growth_needs_something_after_the_start():
    series = Series([0.0, 1.0, 2.0, 3.0], [{"x": 10.0}, {"x": 20.0}, {"x": 20.0}, {"x": 25.0}])
    assert summarise(series)["x"]["growth"] == pytest.approx(1.5)
    assert summarise(series, 1.0)["x"]["growth"] == pytest.approx(0.25)
    assert summarise(series, 1.0)["x"]["first"] == 10.0
    assert summarise(series, 3.0)["x"]["growth"] is None
    assert summarise(series, 9.0)["x"]["growth"] is None
