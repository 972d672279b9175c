"""Each rewrite leaves the stream as it is, and keeps its hands off where that is not sure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deltaserve.pipeline import Plan
from deltaserve.pipeline.rewrites import rewrite
from tests.pipeline.pipelines import count_words, long_enough, stream, texts, tokenizer


def label(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "label": len(row["text"]) % 3}


def upper(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "text": row["text"].upper()}


def noisy(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**row, "noise": float(rng.random())}


def labelled(row: dict[str, Any]) -> bool:
    return row["label"] == 1


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan.from_jsonl(texts(tmp_path_factory.mktemp("a") / "a.jsonl", 300, 1))


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    return Plan.from_jsonl(texts(tmp_path_factory.mktemp("b") / "b.jsonl", 150, 2))


@pytest.fixture(scope="module")
def name(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tokenizer(tmp_path_factory.mktemp("tokenizer"))


def rules(plan: Plan) -> set[str]:
    return {note.rule for note in rewrite(plan.named())[1]}


def operators(plan: Plan) -> list[str]:
    """From the root down, along the first inputs."""
    node, found = rewrite(plan.named())[0].root, []
    while True:
        found.append(node.op)
        if not node.inputs:
            return found
        node = node.inputs[0]


def unchanged(plan: Plan) -> None:
    assert stream(plan) == stream(plan, rewrites=False)


def test_maps_and_filters_become_one_pass(a: Plan) -> None:
    plan = a.map(label).filter(labelled).map(upper).map(noisy, random=True, seed=3).shuffle(1)
    assert operators(plan) == ["shuffle", "fused", "jsonl"]
    unchanged(plan)


def test_a_flat_map_is_not_fused(a: Plan) -> None:
    assert operators(a.map(label).flat_map(lambda row: [row, row]).map(upper)) == [
        "map", "flat_map", "map", "jsonl"
    ]  # fmt: skip


def test_fused_maps_stay_known_by_row_number(a: Plan, b: Plan) -> None:
    plan = Plan.mix({a.map(label).map(upper).shuffle(1): 2, b.map(label): 1}, seed=1).take(77)
    assert "fuse" in rules(plan)
    unchanged(plan)


def test_a_filter_goes_below_a_map_that_does_not_write_what_it_reads(a: Plan) -> None:
    plan = a.map(label, writes=["label"]).shuffle(1).filter(long_enough, reads=["text"])
    assert "filters_first" in rules(plan)
    assert operators(plan)[0] == "shuffle"
    unchanged(plan)


def test_a_filter_goes_below_the_tokenizer(a: Plan, name: str) -> None:
    def first(row: dict[str, Any]) -> bool:
        return row["id"].endswith("1")

    plan = a.tokenize(name).filter(first, reads=["id"])
    assert operators(plan) == ["tokenize", "filter", "jsonl"]
    unchanged(plan)


@pytest.mark.parametrize(
    ("written", "read"), [(["label"], ["label"]), (None, ["text"]), (["label"], None)]
)
def test_a_filter_stays_where_nothing_is_declared_or_it_reads_what_is_written(
    a: Plan, written: list[str] | None, read: list[str] | None
) -> None:
    condition = labelled if read == ["label"] else long_enough
    plan = a.map(label, writes=written).filter(condition, reads=read)
    assert "filters_first" not in rules(plan)
    unchanged(plan)


def test_a_filter_does_not_pass_a_take(a: Plan) -> None:
    plan = a.map(label, writes=["label"]).take(50).filter(long_enough, reads=["text"])
    assert "filters_first" not in rules(plan)
    unchanged(plan)


def test_texts_are_tokenized_together(a: Plan, name: str) -> None:
    plan = a.tokenize(name, max_length=9).shuffle(2)
    assert rules(plan) == {"tokenize_together"}
    unchanged(plan)


def test_rows_are_treated_below_a_mix_of_streams(a: Plan, b: Plan) -> None:
    plan = Plan.mix({a.filter(long_enough): 1, b.filter(long_enough).repeat(2): 2}, seed=2).map(
        noisy, random=True, seed=5
    )
    assert operators(plan)[0] == "mix"
    assert "rows_first" in rules(plan)
    unchanged(plan)


def test_rows_stay_above_a_mix_that_drops_some_and_above_a_take(a: Plan, b: Plan) -> None:
    mixed = Plan.mix({a.filter(long_enough): 1, b: 2}, seed=2, stop="first").map(label)
    taken = a.filter(long_enough).take(20).map(label)
    for plan in (mixed, taken):
        assert "rows_first" not in rules(plan)
        unchanged(plan)


def test_what_does_nothing_goes(a: Plan) -> None:
    plan = Plan.mix({a.repeat(1).shuffle(3, window=1): 1.0}).prefetch(0).take(90).take(40)
    assert operators(plan) == ["take", "jsonl"]
    unchanged(plan)


def test_a_repeat_of_two_and_a_full_shuffle_stay(a: Plan) -> None:
    plan = a.shuffle(1).repeat(2)
    assert rules(plan) == set()
    assert operators(plan) == ["repeat", "shuffle", "jsonl"]


def test_batches_are_made_ahead(a: Plan) -> None:
    plan = a.map(count_words).pack(64, window=4).batch(2)
    assert operators(plan)[0] == "prefetch"
    unchanged(plan)
    assert operators(plan.prefetch(4))[:2] == ["prefetch", "batch"]
    assert "prefetch" not in rules(a.shuffle(1))


def test_a_plan_with_all_of_it(a: Plan, b: Plan, name: str) -> None:
    part = a.map(label, writes=["label"]).filter(long_enough, reads=["text"]).repeat(1)
    plan = Plan.mix({part: 2, b.filter(long_enough): 1}, seed=3).tokenize(name).pack(64, window=4)
    assert rules(plan) == {
        "remove_noops", "filters_first", "rows_first", "fuse", "tokenize_together", "prefetch"
    }  # fmt: skip
    unchanged(plan)
