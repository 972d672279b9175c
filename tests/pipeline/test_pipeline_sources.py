"""Every source gives its rows by number; what is broken is named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltaserve.errors import PipelineError
from deltaserve.pipeline import Plan, open_pipeline
from tests.pipeline.pipelines import values, write_lines

datasets = pytest.importorskip("datasets")
ROWS = [{"id": n, "text": f"row {n}"} for n in range(300)]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet", row_group_size=70)
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "a.txt").write_text("\n".join(row["text"] for row in ROWS))
    plans = [
        Plan.from_jsonl(write_lines(tmp_path / "a.jsonl", ROWS)),
        Plan.from_parquet(tmp_path / "a.parquet"),
        Plan.from_dataset(tmp_path / "saved"),
        Plan.from_dataset(datasets.Dataset.from_list(ROWS)),
        Plan.from_text(tmp_path / "a.txt"),
    ]
    expected = values(plans[0].shuffle(3), "text")
    assert sorted(expected) == sorted(row["text"] for row in ROWS)
    for plan in plans[1:]:
        assert values(plan.shuffle(3), "text", threads=2) == expected
    for plan in plans[1:4]:
        assert values(plan.take(70), "id", processes=1) == list(range(70))


def test_lines_with_blanks_and_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n\n  \n{"n": 2}\r\n{"n": 3}')
    assert values(Plan.from_jsonl(tmp_path / "a.jsonl"), "n") == [1, 2, 3]


def test_a_folder_stands_for_its_files(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_lines(tmp_path / f"{name}.jsonl", [{"n": name}])
    assert values(Plan.from_jsonl(tmp_path), "n") == ["a", "b"]


def test_tokens_in_shards(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(10, dtype=np.uint16))
    np.arange(10, 17, dtype=np.uint16).tofile(tmp_path / "b.bin")
    rows = values(Plan.from_tokens(tmp_path, length=4), "input_ids")
    assert [len(row) for row in rows] == [4, 4, 2, 4, 3]
    assert np.concatenate(rows).tolist() == list(range(17))


def test_whole_files_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("one\ntwo")
    assert values(Plan.from_text(tmp_path, by="file"), "text") == ["one\ntwo"]


def test_an_index_in_the_order_of_a_selection(tmp_path: Path) -> None:
    """ids as ``deltaserve select`` writes them."""
    source = Plan.from_jsonl(write_lines(tmp_path / "a.jsonl", ROWS))
    assert values(Plan.from_index([5, 2, 9], source), "id") == [5, 2, 9]
    chosen = tmp_path / "chosen"
    chosen.mkdir()
    write_lines(
        chosen / "ids.jsonl",
        [{"id": str(n), "rank": r, "gain": 1.0, "weight": 1.0} for r, n in enumerate((7, 3))],
    )
    assert values(Plan.from_index(chosen, source), "id") == [7, 3]
    (chosen / "ids.jsonl").unlink()
    pq.write_table(pa.table({"id": ["11", "4"], "rank": [0, 1]}), chosen / "ids.parquet")
    assert values(Plan.from_index(chosen, source), "id") == [11, 4]


def test_an_index_of_a_real_selection(tmp_path: Path) -> None:
    from deltaserve.select.selector import Selector

    pool = write_lines(tmp_path / "a.jsonl", [{**row, "id": f"r{row['id']}"} for row in ROWS])
    selector = Selector(k=20)
    selector.fit(pool)
    selector.save(tmp_path / "chosen")
    lines = (tmp_path / "chosen" / "ids.jsonl").read_text().splitlines()
    expected = [json.loads(line)["id"] for line in lines]
    assert values(Plan.from_index(tmp_path / "chosen", Plan.from_jsonl(pool)), "id") == expected


@pytest.mark.parametrize(
    ("selection", "message"),
    [([5, 300], "row 300; the source has 300"), (["nobody"], "names 'nobody'"),
     ("missing", "does not exist")],
)  # fmt: skip
def test_an_index_of_rows_that_are_not_there(tmp_path: Path, selection: Any, message: str) -> None:
    source = Plan.from_jsonl(write_lines(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(PipelineError, match=message):
        open_pipeline(Plan.from_index(selection, source))


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1}\n\n{"n": \n{"n": 3}\n[4]\n')
    with pytest.raises(PipelineError, match=r"a\.jsonl, line 3: not JSON.*on_error"):
        values(Plan.from_jsonl(file), "n")
    with pytest.raises(PipelineError, match=r"a\.jsonl, line 3"):
        values(Plan.from_jsonl(file), "n", processes=1)
    with open_pipeline(Plan.from_jsonl(file, on_error="skip").repeat(2)) as rows:
        assert [row["n"] for row in rows] == [1, 3, 1, 3]
        assert rows.skipped == 4


def test_skipped_rows_are_counted_once_over_an_interruption(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(f'{{"n": {n}}}\n' if n % 3 else "{\n" for n in range(300)))
    plan = Plan.from_jsonl(file, on_error="skip")
    with open_pipeline(plan) as rows:
        for _ in range(70):
            next(rows)
        state = rows.get_state()
    with open_pipeline(plan, threads=2) as rows:
        rows.set_state(state)
        assert len(list(rows)) == 130
        assert rows.skipped == 100


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: Plan.from_jsonl(p / "none.jsonl"), "none.jsonl does not exist"),
        (lambda p: Plan.from_jsonl(p), "holds no files"),
        (lambda p: Plan.from_parquet(p / "bad.parquet"), "not a readable Parquet file"),
        (lambda p: Plan.from_tokens(p / "bad.npy", length=3), "not a readable shard"),
        (lambda p: Plan.from_dataset(p / "none"), "save_to_disk"),
        (lambda p: Plan.from_dataset(p), "not a readable dataset"),
        (lambda p: Plan.from_parquet(p / "good.parquet", columns=["b"]), "no column 'b'; it has a"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, build: Any, message: str) -> None:
    (tmp_path / "bad.parquet").write_text("PAR1")
    (tmp_path / "bad.npy").write_text("x")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "good.parquet")
    with pytest.raises(PipelineError, match=message):
        open_pipeline(build(tmp_path))


def test_a_disk_that_dies_and_a_file_that_shrinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.jsonl"
    plan = Plan.from_jsonl(write_lines(file, ROWS))
    with open_pipeline(plan) as rows:
        next(rows)
        os.truncate(file, file.stat().st_size // 2)
        with pytest.raises(PipelineError, match="became shorter"):
            list(rows)

    def dead(*_: Any) -> bytes:
        raise OSError(5, "Input/output error")

    write_lines(file, ROWS)
    with open_pipeline(plan) as rows:
        next(rows)
        monkeypatch.setattr("deltaserve.pipeline.lines.os.pread", dead)
        with pytest.raises(PipelineError, match=r"a\.jsonl, line \d+ cannot be read: Input/output"):
            list(rows)


def test_nothing_at_all_is_an_error(tmp_path: Path) -> None:
    plan = Plan.from_jsonl(write_lines(tmp_path / "a.jsonl", ROWS))
    nobody = plan.filter(lambda row: False, name="nobody")
    for each in (nobody, nobody.repeat(), nobody.repeat().batch(2), nobody.take(3).repeat()):
        with pytest.raises(PipelineError, match="not one of 300 rows passed nobody"):
            list(open_pipeline(each))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(PipelineError, match="no rows: the source is empty"):
        list(open_pipeline(Plan.from_jsonl(tmp_path / "empty.jsonl")))
    (tmp_path / "broken.jsonl").write_text("{\n{\n")
    with pytest.raises(PipelineError, match="2 rows were broken and skipped"):
        list(open_pipeline(Plan.from_jsonl(tmp_path / "broken.jsonl", on_error="skip")))
