"""What a plan over a slow disk is promised is what it gets."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deltaserve.bench.pipeline_disk import Bucket, fat_lines, promised, throttled
from deltaserve.pipeline import Plan, prepare
from deltaserve.pipeline.tuning.calibration import calibrated
from tests.pipeline.pipelines import texts


def test_a_bucket_gives_so_much_a_second() -> None:
    bucket, start = Bucket(1e6), time.perf_counter()
    for _ in range(30):
        bucket.take(10_000)
    assert 0.28 < time.perf_counter() - start < 1.0


def test_the_promised_rate_of_a_slow_disk(tmp_path: Path) -> None:
    assert promised(fat_lines(tmp_path / "fat.jsonl"), 20e6, 1.5) == pytest.approx(1, abs=0.15)


def test_only_sources_that_wait_are_limited_by_a_disk(tmp_path: Path) -> None:
    plan = prepare(Plan.from_jsonl(texts(tmp_path / "a.jsonl", 200)))
    assert calibrated(plan, 0.05).bandwidth == {}
    with throttled(1e5):
        (rising, level) = calibrated(plan, 0.05).bandwidth["jsonl"]
    assert rising[1] == 0
    assert level == (0.0, pytest.approx(1e5, rel=0.5))
