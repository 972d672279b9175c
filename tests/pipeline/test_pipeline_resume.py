"""A stream goes on at any element, bit for bit, whoever computes it."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest

from deltaserve.errors import PipelineError
from deltaserve.pipeline import Plan, open_pipeline
from tests.pipeline.pipelines import (
    chats,
    count_words,
    digest,
    long_enough,
    stream,
    texts,
    tokenizer,
)

CUTS = 200
STATE_BYTES = 1 << 20


def noisy(row: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    return {**row, "noise": float(rng.random())}


def twice(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row, {**row, "text": row["text"] + " again"}]


def drop_some(row: dict[str, Any], rng: np.random.Generator) -> list[dict[str, Any]]:
    return [row] * int(rng.integers(0, 3))


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plan]:
    """Every operator, at every side of the boundary between workers and the consumer."""
    folder = tmp_path_factory.mktemp("resume")
    a = Plan.from_jsonl(texts(folder / "a.jsonl", 700, 1))
    b = Plan.from_jsonl(texts(folder / "b.jsonl", 230, 2))
    chat = Plan.from_jsonl(chats(folder / "c.jsonl", 300, 3))
    name = tokenizer(folder / "tokenizer")
    kept = a.filter(long_enough)
    return {
        "rows": a.map(noisy, random=True, seed=7).shuffle(1).repeat(2),
        "mixed-by-number": Plan.mix({a.shuffle(1).repeat(2): 3, b.shuffle(2, window=50): 1}, seed=4)
        .map(count_words)
        .pack(64, window=8)
        .batch(2),
        "mixed-streams": Plan.mix({kept.shuffle(3): 1, b.filter(long_enough).repeat(3): 2}, seed=5)
        .map(noisy, random=True, seed=1)
        .map(count_words)
        .pack(64, "first_fit", window=5),
        "flat": a.flat_map(drop_some, random=True, seed=3)
        .flat_map(twice)
        .take(900)
        .shuffle(2, window=64)
        .batch(7),
        "chat": chat.chat_template(name)
        .tokenize(name)
        .shuffle(5)
        .repeat(2)
        .pack(128, window=16)
        .batch(2)
        .prefetch(3),
        "buckets": a.tokenize(name)
        .shuffle(1)
        .repeat(2)
        .bucket([8, 16, 32], window=6)
        .batch(4, pad=0),
        "repeated-streams": Plan.interleave([kept, b.filter(long_enough)], block=3)
        .map(count_words)
        .pack(64, window=4)
        .repeat(3),
        "turns": Plan.interleave([a, b.shuffle(1)], block=2).take(600).flat_map(twice),
    }


NAMES = (
    "rows", "mixed-by-number", "mixed-streams", "flat", "chat", "buckets", "repeated-streams",
    "turns",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_at_random_cuts(plans: dict[str, Plan], name: str) -> None:
    """CUTS cuts over all plans; workers change at every cut."""
    draw = random.Random(name)
    states, whole = _run(plans[name])
    assert len(whole) > 20
    assert max(len(json.dumps(state)) for state in states) < STATE_BYTES // 100
    for cut in draw.sample(range(len(whole)), min(CUTS // len(NAMES), len(whole))):
        with open_pipeline(plans[name], threads=draw.choice((0, 1, 3))) as elements:
            elements.set_state(json.loads(json.dumps(states[cut])))
            assert elements.position == cut
            ahead = min(len(whole) - cut, 25)
            assert [digest(next(elements)) for _ in range(ahead)] == whole[cut : cut + ahead]
            # A state saved after going on is the one that was saved without an interruption.
            assert elements.get_state() == states[cut + ahead]


def test_goes_on_to_the_end_and_at_the_end(plans: dict[str, Plan]) -> None:
    states, whole = _run(plans["mixed-streams"])
    for cut in (0, len(whole) - 1, len(whole)):
        with open_pipeline(plans["mixed-streams"]) as elements:
            elements.set_state(states[cut])
            assert [digest(element) for element in elements] == whole[cut:]


@pytest.mark.parametrize("name", ["mixed-by-number", "mixed-streams"])
def test_processes_give_the_same_and_take_over(plans: dict[str, Plan], name: str) -> None:
    states, whole = _run(plans[name])
    with open_pipeline(plans[name], processes=2) as elements:
        cut = len(whole) // 3
        elements.set_state(states[cut])
        assert [digest(next(elements)) for _ in range(10)] == whole[cut : cut + 10]
        state = elements.get_state()
    assert state == states[cut + 10]
    with open_pipeline(plans[name], processes=1) as elements:
        elements.set_state(state)
        assert [digest(element) for element in elements] == whole[cut + 10 :]


@pytest.mark.parametrize("name", NAMES)
def test_threads_give_the_same(plans: dict[str, Plan], name: str) -> None:
    assert stream(plans[name], threads=3) == stream(plans[name])


@pytest.mark.parametrize("rewrites", [False, True])
@pytest.mark.parametrize("name", ["rows", "batch", "pack", "pack-and-batch"])
def test_an_element_that_failed_is_tried_again_and_nothing_is_passed_over(
    tmp_path: Any, name: str, rewrites: bool
) -> None:
    file = tmp_path / "a.jsonl"
    rows = Plan.from_jsonl(texts(file, 400, 1)).map(count_words)
    packed = rows.pack(64, window=4)
    plan = {"rows": rows, "batch": rows.batch(7, pad=0), "pack": packed}.get(name, packed.batch(4))
    whole, good = stream(plan), file.read_text()
    lines = good.splitlines()
    lines[333] = "{" + " " * (len(lines[333]) - 1)
    file.write_text("\n".join(lines) + "\n")
    with open_pipeline(plan, rewrites=rewrites, threads=1) as elements:
        found: list[str] = []
        with pytest.raises(PipelineError, match="line 334"):
            found.extend(digest(element) for element in elements)
        state = elements.get_state()
        with pytest.raises(PipelineError, match="line 334"):
            next(elements)
        assert elements.get_state() == state
        assert 0 < elements.position == len(found) < len(whole)
        file.write_text(good)
        assert found + [digest(element) for element in elements] == whole
    with open_pipeline(plan, rewrites=rewrites) as elements:
        elements.set_state(state)
        assert found + [digest(element) for element in elements] == whole


def test_states_of_other_plans_are_refused(plans: dict[str, Plan]) -> None:
    with open_pipeline(plans["rows"]) as elements:
        next(elements)
        state = elements.get_state()
    with open_pipeline(plans["flat"]) as other, pytest.raises(PipelineError, match="another plan"):
        other.set_state(state)


def test_another_seed_is_another_plan_for_states_only(plans: dict[str, Plan]) -> None:
    one = Plan(plans["rows"].root.inputs[0]).shuffle(1)
    two = Plan(plans["rows"].root.inputs[0]).shuffle(2)
    assert one.fingerprint() == two.fingerprint()
    with open_pipeline(one) as elements:
        state = elements.get_state()
    with open_pipeline(two) as other, pytest.raises(PipelineError, match="another plan"):
        other.set_state(state)


def test_a_source_that_grew_is_refused(tmp_path: Any) -> None:
    plan = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 10))
    with open_pipeline(plan) as elements:
        next(elements)
        state = elements.get_state()
    texts(tmp_path / "a.jsonl", 11)
    with open_pipeline(plan) as elements, pytest.raises(PipelineError, match=r"10.*11"):
        elements.set_state(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 99}, "format 99"),
        ({"stream": {"child": 3}}, "damaged"),
        ({"stream": None}, "damaged"),
        ({"shape": "pack(rows)"}, "rewrites"),
    ],
)
def test_damaged_states_are_refused(
    plans: dict[str, Plan], change: dict[str, Any], message: str
) -> None:
    with open_pipeline(plans["rows"]) as elements:
        state = elements.get_state() | change
        with pytest.raises(PipelineError, match=message):
            elements.set_state(state)
        with pytest.raises(PipelineError, match="not a saved state"):
            elements.set_state({})


def test_prefetch_and_cache_may_change_between_save_and_resume(
    plans: dict[str, Plan], tmp_path: Any
) -> None:
    plan = plans["buckets"]
    states, whole = _run(plan)
    with open_pipeline(plan.prefetch(5), cache=tmp_path) as elements:
        elements.set_state(states[4])
        assert digest(next(elements)) == whole[4]


def _run(plan: Plan) -> tuple[list[dict[str, Any]], list[str]]:
    """The state before each element and after the last, and all elements."""
    with open_pipeline(plan) as elements:
        states, found = [elements.get_state()], []
        for element in elements:
            found.append(digest(element))
            states.append(elements.get_state())
    return states, found
