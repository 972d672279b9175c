"""Packed rows: full, nothing lost, and no document sees another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from deltaserve.errors import PipelineError
from deltaserve.pipeline import Plan, open_pipeline
from deltaserve.pipeline.packing import ALGORITHMS, IGNORED
from tests.families import make_base
from tests.pipeline.pipelines import write_lines

ROOM = 512


def rows(folder: Path, lengths: Any, vocabulary: int = 90) -> tuple[Plan, list[list[int]]]:
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, vocabulary, int(length)).tolist() for length in lengths]
    return Plan.from_jsonl(write_lines(folder / "rows.jsonl", [{"input_ids": i} for i in ids])), ids


def documents(packed: list[dict[str, Any]]) -> list[list[int]]:
    found = []
    for row in packed:
        ends = np.cumsum(row["seq_lengths"])
        for end, length in zip(ends, row["seq_lengths"], strict=True):
            found.append(row["input_ids"][end - length : end].tolist())
    return found


@pytest.mark.parametrize(("sigma", "mean"), [(1.0, 4.5), (1.5, 4.0), (0.5, 5.0)])
def test_best_fit_fills_lognormal_rows_and_loses_no_token(
    tmp_path: Path, sigma: float, mean: float
) -> None:
    lengths = np.clip(np.random.default_rng(1).lognormal(mean, sigma, 6000), 1, 3000).astype(int)
    plan, ids = rows(tmp_path, lengths)
    packed = list(open_pipeline(plan.shuffle(1).pack(ROOM)))
    places = sum(row["input_ids"].size for row in packed[:-1])  # the last is what is left
    used = sum(int(row["seq_lengths"].sum()) for row in packed[:-1])
    assert used / places >= 0.98
    pieces = [each[at : at + ROOM] for each in ids for at in range(0, len(each), ROOM)]
    assert sorted(documents(packed)) == sorted(pieces)


@given(
    st.lists(st.integers(1, 40), max_size=80),
    st.sampled_from(sorted(ALGORITHMS)),
    st.integers(40, 60),
)
@settings(max_examples=200, deadline=None)
def test_every_row_has_one_place(lengths: list[int], algorithm: str, room: int) -> None:
    bins = ALGORITHMS[algorithm](lengths, room)
    assert sorted(at for each in bins for at in each) == list(range(len(lengths)))
    assert all(sum(lengths[at] for at in each) <= room for each in bins)
    # At most one bin can be half empty, whichever algorithm.
    assert sum(sum(lengths[at] for at in each) * 2 <= room for each in bins) <= 1


def test_first_fit_keeps_the_order_of_arrival(tmp_path: Path) -> None:
    plan, ids = rows(tmp_path, [4, 5, 3, 6, 2])
    packed = list(open_pipeline(plan.pack(9, "first_fit")))
    assert documents(packed) == [ids[0], ids[1], ids[2], ids[3], ids[4]]


def test_fields_of_a_packed_row(tmp_path: Path) -> None:
    records = [{"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}, {"input_ids": [8, 9]}]
    plan = Plan.from_jsonl(write_lines(tmp_path / "rows.jsonl", records)).pack(7, pad_id=2)
    (row,) = open_pipeline(plan)
    assert row["input_ids"].tolist() == [5, 6, 7, 8, 9, 2, 2]
    assert row["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert row["segment_ids"].tolist() == [1, 1, 1, 2, 2, 0, 0]
    assert row["labels"].tolist() == [IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED]
    assert row["seq_lengths"].tolist() == [3, 2]


def test_rows_that_are_too_long(tmp_path: Path) -> None:
    plan, (ids,) = rows(tmp_path, [25])
    split = documents(list(open_pipeline(plan.pack(10))))
    assert sorted(split, key=len) == sorted([ids[:10], ids[10:20], ids[20:]], key=len)
    assert documents(list(open_pipeline(plan.pack(10, overflow="truncate")))) == [ids[:10]]
    with pytest.raises(PipelineError, match="25 tokens, more than 10"):
        list(open_pipeline(plan.pack(10, overflow="error")))


def test_a_model_sees_each_document_alone(tmp_path: Path) -> None:
    """The oracle: logits of a packed row are those of its documents one by one."""
    plan, _ = rows(tmp_path, [9, 14, 5, 20, 7, 11], vocabulary=90)
    model = AutoModelForCausalLM.from_pretrained(make_base("llama", tmp_path / "base")).eval()
    packed = list(open_pipeline(plan.pack(32)))
    assert any(len(row["seq_lengths"]) > 1 for row in packed)
    for row in packed:
        ids = torch.tensor(row["input_ids"])[None].long()
        positions = torch.tensor(row["position_ids"])[None].long()
        with torch.no_grad():
            together = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
            apart = model(input_ids=ids, use_cache=False).logits[0]
        first = int(row["seq_lengths"][0])
        torch.testing.assert_close(together[:first], apart[:first], atol=1e-4, rtol=1e-4)
        if len(row["seq_lengths"]) > 1:  # without the positions documents do see each other
            assert (together[first] - apart[first]).abs().max() > 1e-2
        at = 0
        for length in row["seq_lengths"].tolist():
            with torch.no_grad():
                alone = model(input_ids=ids[:, at : at + length]).logits[0]
            torch.testing.assert_close(together[at : at + length], alone, atol=1e-4, rtol=1e-4)
            at += length


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "input_ids.*tokenize first"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "2 tokens, but a loss mask for 1"),
        ({"input_ids": "words"}, "input_ids"),
    ],
)
def test_rows_that_cannot_be_packed(tmp_path: Path, record: Any, message: str) -> None:
    plan = Plan.from_jsonl(write_lines(tmp_path / "rows.jsonl", [record])).pack(8)
    with pytest.raises(PipelineError, match=message):
        list(open_pipeline(plan))
