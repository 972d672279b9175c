"""The benchmark of random cuts tells an exact continuation from another."""

from __future__ import annotations

from typing import Any

import pytest

from deltaserve.bench import pipeline_resume
from deltaserve.bench.pipeline_cases import CASES
from deltaserve.bench.select_check import Report

PARQUET = [case for case in CASES if case.name == "parquet"]
SHARE = "share of cuts that went on exactly"


def figures(cuts: int = 3) -> dict[str, Any]:
    report = Report()
    pipeline_resume.resume(report, 0, PARQUET, cuts=cuts)
    return {check.name: check for check in report.checks}


def test_cuts_go_on_exactly_with_every_kind_of_worker() -> None:
    found = figures()
    assert found[SHARE].passed
    for kind in ("no workers", "threads", "processes"):
        assert found[f"cuts restored with {kind}"].value == 1
    assert 0 < found["bytes of the largest state"].value < 1000


def test_a_state_of_another_element_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipeline_resume._whole

    def shifted(plan: Any) -> Any:
        states, found = whole(plan)
        return [states[1], *states], found

    monkeypatch.setattr(pipeline_resume, "_whole", shifted)
    found = figures(cuts=1)
    assert found[SHARE].value < 1
    assert not found[SHARE].passed
