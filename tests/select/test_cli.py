"""deltaserve select as typed: files in, files out, one line and exit code 2 for what is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from deltaserve.cli.main import dispatch
from tests.select.pools import sentences, write_lines

RECORDS = [
    {"id": i, "text": t, "topic": "ab"[i % 2], "worth": float(i)}
    for i, t in enumerate(sentences(60, low=5, high=15))
]


@pytest.fixture
def pool(tmp_path):
    return write_lines(tmp_path / "pool.jsonl", RECORDS)


def test_a_selection_is_ids_samples_and_a_receipt(pool, tmp_path, capsys):
    out = tmp_path / "out"
    assert (
        dispatch(["select", str(pool), "-k", "7", "--utility", "column:worth", "-o", str(out)]) == 0
    )
    assert sorted(p.name for p in out.iterdir()) == ["ids.jsonl", "receipt.json", "samples.jsonl"]
    ids = [json.loads(line) for line in (out / "ids.jsonl").read_text().splitlines()]
    assert [each["rank"] for each in ids] == list(range(7))
    assert [each["weight"] for each in ids] == [1.0] * 7
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {str(s["id"]) for s in samples} == {each["id"] for each in ids}
    assert all(sample in RECORDS for sample in samples)
    shown = capsys.readouterr()
    assert "stratified random" in shown.out
    assert "Bounding" in shown.out
    assert "7 of 60 samples are in" in shown.out
    assert shown.err == ""


def test_parquet_in_parquet_out(tmp_path):
    pq.write_table(pa.Table.from_pylist(RECORDS), tmp_path / "pool.parquet")
    out = tmp_path / "out"
    argv = ["select", str(tmp_path / "pool.parquet"), "--per", "label", "--label-column", "topic"]
    assert dispatch([*argv, "--count", "a=3", "--count", "b=4", "-o", str(out)]) == 0
    rows = pq.read_table(out / "samples.parquet").to_pylist()
    assert sorted(row["topic"] for row in rows) == ["a"] * 3 + ["b"] * 4
    assert pq.read_table(out / "ids.parquet")["rank"].to_pylist() == list(range(7))


BAD = [
    (["-k", "61"], "k is 61, but the pool has only 60 points"),
    ([], "how much to select? Give k, tokens, or counts"),
    (["-k", "5", "--utility", "best"], "no utility 'best': choose one of none, length"),
    (["-k", "5", "--utility", "column:topic"], "line 1: \"topic\" is 'a', not a finite number"),
    (["-k", "5", "--utility", "nan.npy"], "the utility of sample 2 is nan"),
    (["-k", "5", "--embeddings", "ragged.parquet"], "embeddings of different dimensions: row 1"),
    (["-k", "5", "--objective", "magic"], "no objective 'magic'"),
    (["-k", "5", "--bounding", "maybe"], "no bounding 'maybe'"),
    (["-k", "5", "--per", "label", "--label-column", "topic", "--count", "a"], "needs NAME=N"),
    (["--per", "label", "--label-column", "topic", "--count", "a=31"], "has 30 samples, 31 were"),
    (["-k", "5", "--embed", "."], "cannot be loaded"),
    (["-k", "five"], "see deltaserve select --help"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    pool, tmp_path, capsys, monkeypatch, options, message
):
    monkeypatch.chdir(tmp_path)
    np.save("nan.npy", np.where(np.arange(60) == 2, np.nan, 1.0))
    pq.write_table(pa.table({"embedding": [[1.0, 2.0], [1.0]] * 30}), "ragged.parquet")
    before = sorted(p.name for p in tmp_path.iterdir())
    assert dispatch(["select", str(pool), *options, "-o", "out"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_duplicate_ids_and_taken_directories_are_refused(tmp_path, capsys):
    twice = write_lines(tmp_path / "twice.jsonl", [RECORDS[0], RECORDS[1], RECORDS[0]])
    assert dispatch(["select", str(twice), "-k", "1", "-o", str(tmp_path / "out")]) == 2
    assert "the id '0' occurs twice" in capsys.readouterr().err
    assert dispatch(["select", str(twice), "-k", "1", "-o", str(tmp_path)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


def test_without_the_extra_it_says_what_to_install(pool, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert dispatch(["select", str(pool), "-k", "5", "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == (
        "deltaserve: error: data selection needs faiss: pip install 'deltaserve[select]'\n"
    )


def test_help_teaches_by_example(capsys):
    assert dispatch(["select", "--help"]) == 0
    assert "deltaserve select pool.jsonl -k 10000 -o chosen" in capsys.readouterr().out
    loaded = "import sys; from deltaserve.cli.main import dispatch; dispatch(['--help']); "
    loaded += "sys.exit(bool({'numba', 'faiss', 'pyarrow', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0
