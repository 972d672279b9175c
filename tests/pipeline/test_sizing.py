"""Estimated sizes of caches beside the files that such caches write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaserve.pipeline import Plan, open_pipeline, prepare
from deltaserve.pipeline.tuning.calibration import calibrated
from deltaserve.pipeline.tuning.settings import Settings, applied
from tests.pipeline.pipelines import count_words, long_enough, texts, tokenizer

ROWS = 6000


def written(plan: Plan, name: str, folder: Path) -> int:
    """Bytes of the cache behind an operator, filled."""
    kept = applied(prepare(plan), Settings(caches=(name,)))
    with open_pipeline(kept, cache=folder, rewrites=False) as elements:
        for _ in elements:
            pass
    return sum(file.stat().st_size for file in folder.rglob("*.rows"))


def halves(row: dict[str, Any]) -> list[dict[str, Any]]:
    ids = row["input_ids"]
    return [{"input_ids": ids[: len(ids) // 2]}, {"input_ids": ids[len(ids) // 2 :]}]


def plans(folder: Path) -> dict[str, Plan]:
    lines = Plan.from_jsonl(texts(folder / "a.jsonl", ROWS))
    name = tokenizer(folder / "tokenizer")
    return {
        "tokens": lines.tokenize(name).shuffle(1).repeat(2).pack(256),
        "thinned": lines.filter(long_enough).tokenize(name).repeat(2).batch(4, pad=0),
        "more": lines.map(count_words).flat_map(halves).repeat(2).batch(4, pad=0),
        "chosen": Plan.from_index(list(range(0, ROWS, 3)), lines).map(count_words).repeat(2),
    }


@pytest.mark.parametrize("case", ["tokens", "thinned", "more", "chosen"])
def test_sizes_of_caches(tmp_path: Path, case: str) -> None:
    """2 % behind the source, 10 % behind what is made of its rows."""
    plan = plans(tmp_path)[case]
    source, *operators = list((found := calibrated(prepare(plan), 0.05)).bytes)
    assert found.bytes[source] == pytest.approx(written(plan, source, tmp_path / "s"), rel=0.02)
    last = operators[-1]
    assert found.bytes[last] == pytest.approx(written(plan, last, tmp_path / "l"), rel=0.1)


def test_columns_have_no_lines_to_go_by(tmp_path: Path) -> None:
    """Lengths there are those of the sampled rows alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lengths = np.random.default_rng(0).integers(20, 60, 3000)
    table = pa.table({"text": ["x" * int(each) for each in lengths]})
    pq.write_table(table, tmp_path / "a.parquet")
    plan = Plan.from_parquet(tmp_path / "a.parquet").repeat(2)
    found = calibrated(prepare(plan), 0.05)
    assert found.bytes["parquet"] == pytest.approx(written(plan, "parquet", tmp_path), rel=0.05)


def opaque(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"what": object()}


def test_what_no_cache_can_keep_fits_nowhere(tmp_path: Path) -> None:
    plan = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 100)).map(opaque).repeat(2)
    assert calibrated(prepare(plan), 0.02).bytes["map"] == float("inf")
