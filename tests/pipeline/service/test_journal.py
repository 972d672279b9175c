"""The journal: whole records or none, whatever was cut."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.errors import ServiceError
from deltaserve.pipeline.service.journal import MAGIC, Journal, read

RECORDS = [{"op": "start", "n": 1}, {"op": "grant", "ranges": [[0, 8], [8, 16]]}, {"op": "end"}]


def _write(folder, records):
    journal = Journal(folder, lambda record: None)
    ends = [journal.bytes]
    for record in records:
        journal.append(record)
        ends.append(journal.bytes)
    journal.close()
    return ends


def test_a_cut_at_any_byte_loses_at_most_the_record_it_hits(tmp_path):
    ends = _write(tmp_path, RECORDS)
    whole = (tmp_path / "journal").read_bytes()
    for cut in range(len(whole) + 1):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        (folder / "journal").write_bytes(whole[:cut])
        seen = []
        journal = Journal(folder, seen.append)
        assert seen == RECORDS[: sum(end <= cut for end in ends[1:])]
        # And it goes on from there.
        journal.append({"op": "more"})
        journal.close()
        assert read(folder / "journal")[0] == [*seen, {"op": "more"}]


def test_any_flipped_byte_before_the_end_is_found(tmp_path):
    ends = _write(tmp_path, RECORDS)
    whole = (tmp_path / "journal").read_bytes()
    for at in range(ends[-2]):
        data = bytearray(whole)
        data[at] ^= 0x10
        (tmp_path / "journal").write_bytes(data)
        for _ in range(2):  # and the folder is free again
            with pytest.raises(ServiceError, match=r"damaged at byte|not a journal"):
                Journal(tmp_path, lambda record: None)


def test_zeros_after_the_end_are_a_cut(tmp_path):
    _write(tmp_path, RECORDS)
    with open(tmp_path / "journal", "ab") as file:
        file.write(bytes(100))
    assert read(tmp_path / "journal")[0] == RECORDS


def test_two_dispatchers_do_not_share_a_folder(tmp_path):
    journal = Journal(tmp_path, lambda record: None)
    with pytest.raises(ServiceError, match="another dispatcher"):
        Journal(tmp_path, lambda record: None)
    journal.close()
    Journal(tmp_path, lambda record: None).close()


def test_a_full_disk_promises_nothing(tmp_path, monkeypatch):
    journal = Journal(tmp_path, lambda record: None)
    journal.append(RECORDS[0])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fdatasync", full)
    with pytest.raises(ServiceError, match="make room"):
        journal.append(RECORDS[1])
    monkeypatch.undo()
    journal.append(RECORDS[2])
    journal.close()
    assert read(tmp_path / "journal")[0] == [RECORDS[0], RECORDS[2]]


def test_compaction_leaves_what_it_is_given(tmp_path):
    journal = Journal(tmp_path, lambda record: None)
    for number in range(100):
        journal.append({"op": "ack", "n": number})
    before = journal.bytes
    journal.compact([{"op": "ack", "n": 99}])
    journal.append({"op": "ack", "n": 100})
    assert journal.bytes < before
    journal.close()
    assert [record["n"] for record in read(tmp_path / "journal")[0]] == [99, 100]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers(-(2**40), 2**40)), max_size=6))
def test_what_was_written_is_read(tmp_path_factory, records):
    folder = tmp_path_factory.mktemp("journal")
    _write(folder, records)
    found, size = read(folder / "journal")
    assert found == records
    assert size == (folder / "journal").stat().st_size >= len(MAGIC)
