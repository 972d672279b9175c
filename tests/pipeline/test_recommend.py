"""Advice from traces with known costs, and its picture."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from deltaserve.pipeline.tuning.cacheplace import Nature
from deltaserve.pipeline.tuning.picture import draw, write
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.recommend import advise
from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.tune import tune
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


class Runs:
    """A pipeline that gives so many elements in a second with so many threads."""

    def __init__(self, elements):
        self.elements = elements

    def __next__(self):
        return {}

    def start_clock(self):
        pass

    def close(self):
        pass

    def trace(self):
        return chain({"name": "read", "cpu": 1}, elements=self.elements, wall_ms=1000.0, cores=4)


@pytest.mark.parametrize(
    ("rates", "threads"),
    [({16: 200, 1: 224, 5: 193}, 1), ({16: 200, 1: 224, 5: 300}, 5), ({16: 400, 1: 9, 5: 9}, 16)],
)
def test_the_fastest_of_three_traces_is_kept(rates, threads):
    found = tune(
        lambda settings: Runs(rates[settings.workers("read")]),
        Settings({"read": 16}),
        ["read"],
        Resources(cores=4, locked=False),
        elements=1,
    )
    assert found.settings.threads == {"read": threads}
    assert found.rate == rates[threads]


def test_the_picture_is_one_valid_file(tmp_path):
    trace = text()
    advice = advise(trace, Resources(cores=4, locked=False))
    write(tmp_path / "trace.svg", trace, advice)
    root = ElementTree.parse(tmp_path / "trace.svg").getroot()
    words = " ".join(each.text or "" for each in root.iter("{http://www.w3.org/2000/svg}text"))
    assert "read limits" in words
    assert "http" not in draw(trace, advice).replace("http://www.w3.org/2000/svg", "")
