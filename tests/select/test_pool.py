"""Pools: every format reads and writes back the same samples; errors name file and line."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaserve.errors import OutputExistsError, SelectionError
from deltaserve.select.output import write_selection
from deltaserve.select.pool import Columns, Pool, occurrences

datasets = pytest.importorskip("datasets")

RECORDS = [
    {"text": f"sample number {n}", "topic": "even" if n % 2 == 0 else "odd", "cost": n + 1}
    for n in range(12)
]
CHAT = {
    "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}],
}


def write_lines(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    return path


def write_pool(folder, kind, records):
    if kind == "jsonl":
        return write_lines(folder / "pool.jsonl", records)
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(records), folder / "pool.parquet", row_group_size=5)
        return folder / "pool.parquet"
    datasets.Dataset.from_list(records).save_to_disk(str(folder / "pool"))
    return folder / "pool"


def read_back(out):
    if (out / "samples.jsonl").exists():
        return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    if (out / "samples.parquet").exists():
        return pq.read_table(out / "samples.parquet").to_pylist()
    return datasets.load_from_disk(str(out / "samples")).to_list()


def read_ids(out):
    if (out / "ids.parquet").exists():
        return pq.read_table(out / "ids.parquet").to_pylist()
    return [json.loads(line) for line in (out / "ids.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "dataset"])
@pytest.mark.parametrize("shape", ["text", "messages"])
def test_the_selected_samples_come_back_as_they_were(tmp_path, kind, shape):
    records = RECORDS
    if shape == "messages":
        records = [{**CHAT, "topic": r["topic"], "note": r["text"]} for r in RECORDS]
    pool = Pool(write_pool(tmp_path, kind, records))
    rows = np.array([7, 2, 11])
    gains, weights = np.array([3.0, 2.0, 1.0]), np.array([1.0, 1.0, 2.5])
    write_selection(tmp_path / "out", pool, rows, gains, weights, {"k": 3})
    assert read_back(tmp_path / "out") == [records[2], records[7], records[11]]
    assert read_ids(tmp_path / "out") == [
        {"id": name, "rank": rank, "gain": gain, "weight": weight}
        for rank, (name, gain, weight) in enumerate(
            zip(pool.ids(rows), gains, weights, strict=True)
        )
    ]
    assert json.loads((tmp_path / "out" / "receipt.json").read_text()) == {"k": 3}


def test_every_format_gives_the_same_ids_contents_and_digest(tmp_path):
    pools = [Pool(write_pool(tmp_path, k, RECORDS)) for k in ("jsonl", "parquet", "dataset")]
    pools.append(Pool(datasets.Dataset.from_list(RECORDS)))
    assert len({tuple(pool.ids()) for pool in pools}) == 1
    assert len({pool.digest for pool in pools}) == 1


def test_lines_are_copied_byte_for_byte(tmp_path):
    lines = [b'{ "text":"caf\\u00e9" ,  "x":1.50 }', '{"text": "naïve"}'.encode(), b'{"text": ""}']
    (tmp_path / "pool.jsonl").write_bytes(b"\r\n\n".join(lines))
    pool = Pool(tmp_path / "pool.jsonl")
    write_selection(tmp_path / "out", pool, np.array([1, 0]), np.ones(2), np.ones(2), {})
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == b"\n".join(lines[:2]) + b"\n"


def test_several_files_are_one_pool_and_each_is_a_source(tmp_path):
    write_lines(tmp_path / "a.jsonl", RECORDS[:5])
    write_lines(tmp_path / "b.jsonl", RECORDS[5:])
    pool = Pool(tmp_path)
    assert len(pool) == 12
    assert np.bincount(pool.sources.codes).tolist() == [5, 7]
    assert pool.digest == Pool([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]).digest
    write_selection(tmp_path / "out", pool, np.array([4, 5]), np.ones(2), np.ones(2), {})
    assert read_back(tmp_path / "out") == RECORDS[4:6]


def test_an_id_made_from_the_content_survives_moving_the_sample(tmp_path):
    first = Pool(write_lines(tmp_path / "a.jsonl", RECORDS))
    moved = Pool(write_lines(tmp_path / "b.jsonl", RECORDS[::-1]))
    assert first.ids() == moved.ids()[::-1]


def test_equal_texts_get_distinct_ids(tmp_path):
    pool = Pool(write_lines(tmp_path / "a.jsonl", [{"text": "same"}] * 3))
    plain, *others = pool.ids()
    assert others == [f"{plain}-2", f"{plain}-3"]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_occurrences_count_what_stands_before(values):
    counted = occurrences(np.array(values, dtype=np.uint64)).tolist()
    assert counted == [values[:at].count(value) for at, value in enumerate(values)]


def test_named_columns_are_read(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{**r, "id": f"s{r['cost']}"} for r in RECORDS])
    pool = Pool(path, Columns(label="topic", source="topic", tokens="cost", utility="cost"))
    assert pool.labels.names == ("even", "odd")
    assert pool.labels.codes.tolist() == [0, 1] * 6
    assert pool.tokens.tolist() == pool.utility.tolist() == list(range(1, 13))
    assert pool.ids(np.array([3])) == ["s4"]
    assert pool.rows(["s9", "s1"]).tolist() == [8, 0]
    with pytest.raises(SelectionError, match="no sample with the id 's99'"):
        pool.rows(["s99"])


def test_other_names_for_the_text(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"body": "hello", "key": 7}])
    pool = Pool(path, Columns(text="body", id="key"))
    assert [s.text for s in pool.samples()] == ["hello"]
    assert pool.ids() == ["7"]


def test_contents_in_parts_and_tool_calls_are_read(tmp_path):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "look"}, {"type": "image"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
    ]
    pool = Pool(write_lines(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert next(pool.samples()).text == "look\n"


GOOD = '{"text": "fine"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"pool.jsonl, line 3: not JSON"),
        ("[1]", r"line 3: not a JSON object, but a list"),
        ('{"text": 5}', r'line 3: needs either "text", a string, or "messages"'),
        ('{"prompt": "x"}', r"line 3: needs either"),
        ('{"messages": []}', r'line 3: "messages" is \[\]'),
        ('{"messages": [{"role": "user", "content": 5}]}', r"line 3: a message needs"),
        ('{"messages": ["hi"]}', r"line 3: a message needs"),
        ('{"text": "a", "id": "x"}', r'line 3: "id" is \'x\'; give every sample'),
    ],
)
def test_a_wrong_sample_is_named_by_file_and_line(tmp_path, line, message):
    (tmp_path / "pool.jsonl").write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(SelectionError, match=message):
        Pool(tmp_path / "pool.jsonl")


@pytest.mark.parametrize(
    ("columns", "value", "message"),
    [
        (Columns(label="x"), None, 'line 2: "x" is missing, not a string or integer'),
        (Columns(source="x"), [1], r'"x" is \[1\], not a string or integer'),
        (Columns(tokens="x"), 0, '"x" is 0, not a number of tokens'),
        (Columns(tokens="x"), 1.5, '"x" is 1.5, not a number of tokens'),
        (Columns(utility="x"), float("nan"), '"x" is nan, not a finite number'),
        (Columns(utility="x"), "high", "\"x\" is 'high', not a finite number"),
    ],
)
def test_a_wrong_column_is_named_by_file_and_line(tmp_path, columns, value, message):
    write_lines(tmp_path / "a.jsonl", [{"text": "a", "x": 1}, {"text": "b", "x": value}])
    with pytest.raises(SelectionError, match=message):
        Pool(tmp_path / "a.jsonl", columns)


def test_an_id_that_occurs_twice_is_refused_with_both_places(tmp_path):
    write_lines(tmp_path / "a.jsonl", [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}])
    write_lines(tmp_path / "b.jsonl", [{"id": 3, "text": "c"}, {"id": 2, "text": "d"}])
    with pytest.raises(
        SelectionError, match=r"'2' occurs twice: .*a.jsonl, line 2 and .*b.*line 2"
    ):
        Pool(tmp_path)


def test_what_is_no_pool_is_refused(tmp_path):
    with pytest.raises(SelectionError, match="cannot be read: No such file"):
        Pool(tmp_path / "absent.jsonl")
    with pytest.raises(SelectionError, match="cannot be read: No such file"):
        Pool(tmp_path / "absent.parquet")
    with pytest.raises(SelectionError, match="holds no samples"):
        Pool(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(SelectionError, match="the pool is empty"):
        Pool(tmp_path / "empty.jsonl")
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(SelectionError, match="not a readable Parquet file"):
        Pool(tmp_path / "bad.parquet")
    (tmp_path / "bad.csv").write_text("text")
    with pytest.raises(SelectionError, match="a pool is"):
        Pool(tmp_path / "bad.csv")
    with pytest.raises(SelectionError, match="not a int"):
        Pool(5)
    with pytest.raises(SelectionError, match="mixes jsonl and parquet"):
        Pool([write_pool(tmp_path, "jsonl", RECORDS), write_pool(tmp_path, "parquet", RECORDS)])


def test_a_dataset_of_several_splits_asks_for_one(tmp_path):
    split = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(SelectionError, match=r"several splits; name one of .*test, .*train"):
        Pool(tmp_path / "d")
    assert len(Pool(tmp_path / "d" / "train")) == 12
    with pytest.raises(SelectionError, match="not a DatasetDict"):
        Pool(datasets.DatasetDict(train=split))


def test_nothing_is_left_when_writing_fails(tmp_path):
    folder = tmp_path / "pool"
    folder.mkdir()
    write_pool(folder, "parquet", RECORDS)
    pq.write_table(pa.table({"text": ["other columns"]}), folder / "second.parquet")
    pool = Pool(folder)
    with pytest.raises(SelectionError, match="has other columns"):
        write_selection(tmp_path / "out", pool, np.array([0]), np.ones(1), np.ones(1), {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pool"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep me")
    with pytest.raises(OutputExistsError):
        write_selection(tmp_path / "out", pool, np.array([0]), np.ones(1), np.ones(1), {})
    assert (tmp_path / "out" / "mine").read_text() == "keep me"
