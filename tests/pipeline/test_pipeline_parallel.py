"""Data-parallel consumers: together they get the plan's batches, before and after their number
has changed."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.errors import PipelineError
from deltaserve.pipeline import Plan, open_pipeline
from deltaserve.pipeline.parallel import Share
from tests.pipeline.pipelines import count_words, digest, long_enough, texts

NUMBERS = (1, 2, 4)
BATCHES = 24


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Plan]:
    folder = tmp_path_factory.mktemp("parallel")
    a = Plan.from_jsonl(texts(folder / "a.jsonl", 300, 1))
    b = Plan.from_jsonl(texts(folder / "b.jsonl", 230, 2))
    kept = a.filter(long_enough).shuffle(3)
    mixed = Plan.mix({kept: 1, b.filter(long_enough).repeat(3): 2}, seed=5)
    return [
        a.shuffle(1).repeat().batch(4),
        a.map(count_words).shuffle(1).repeat(6).bucket([8, 16], window=4).batch(8, pad=0,
                                                                              drop_remainder=True),
        mixed.map(count_words).repeat().pack(64, window=5).batch(4),
        a.map(count_words).pack(64, window=3).repeat().batch(4).prefetch(2),
    ]  # fmt: skip


def opened(plan: Plan, consumer: int, consumers: int) -> Share:
    # Whoever computes rows: the stream is the same, so one consumer may have threads.
    return Share(open_pipeline(plan, threads=2 * (consumer % 2)), plan, consumer, consumers)


def joined(parts: list[Any]) -> Any:
    """The batch that consumers have between them."""
    return {
        name: np.concatenate([part[name] for part in parts])
        if isinstance(parts[0][name], np.ndarray)
        else [value for part in parts for value in part[name]]
        for name in parts[0]
    }


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_number_of_consumers_goes_on_where_another_stopped(
    plans: list[Plan], data: st.DataObject
) -> None:
    plan = data.draw(st.sampled_from(plans))
    with open_pipeline(plan) as elements:
        whole = [digest(next(elements)) for _ in range(BATCHES)]
    seen: list[str] = []
    state: Any = None
    while len(seen) < BATCHES:
        consumers = data.draw(st.sampled_from(NUMBERS))
        take = data.draw(st.integers(1, BATCHES - len(seen)))
        shares = [opened(plan, consumer, consumers) for consumer in range(consumers)]
        try:
            for share in shares:
                if state is not None:
                    share.set_state(state)
            for _ in range(take):
                seen.append(digest(joined([next(share) for share in shares])))
            states = [json.loads(json.dumps(share.get_state())) for share in shares]
            assert all(each == states[0] for each in states)
            state = data.draw(st.sampled_from(states))
        finally:
            for share in shares:
                share.close()
    assert seen == whole


@pytest.mark.parametrize(
    ("end", "consumers", "told"),
    [
        (lambda rows: rows.repeat().batch(6), 4, "batches of 6 rows cannot be shared out evenly"),
        (lambda rows: rows.batch(8), 4, "give batch drop_remainder=True"),
        (lambda rows: rows.repeat().take(99).batch(8), 4, "give batch drop_remainder=True"),
        (lambda rows: rows, 2, "this plan ends with jsonl: end it with a batch"),
        (lambda rows: rows.repeat().batch(4), 0, "consumer 0 of 0"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(
    tmp_path: Any, end: Any, consumers: int, told: str
) -> None:
    plan = end(Plan.from_jsonl(texts(tmp_path / "a.jsonl", 20)))
    with open_pipeline(plan) as batches, pytest.raises(PipelineError, match=told):
        Share(batches, plan, 0, consumers)


def test_one_consumer_gets_a_last_batch_that_is_not_full(tmp_path: Any) -> None:
    plan = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 10)).batch(4)
    with Share(open_pipeline(plan), plan, 0, 1) as share:
        assert [len(batch["id"]) for batch in share] == [4, 4, 2]
