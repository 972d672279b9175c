"""Tokens of answers that are not streamed come several at a time, all of them and in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deltaserve.engine.bundles import HOLD_SECONDS, Bundles
from deltaserve.engine.types import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)

NAMES = ("whole", "streamed")
ENDS = (FinishReason.LENGTH, FinishReason.STOP, FinishReason.ERROR, FinishReason.ABORT)


def request(name: str) -> EngineRequest:
    sampling = SamplingParams(max_tokens=9)
    return EngineRequest(name, "base", (1,), sampling, streamed=name == "streamed")


def token(name: str, number: int, reason: FinishReason | None = None) -> TokenEvent:
    found = (TokenLogprobs(number, -1.0, 1, ()),)
    return TokenEvent(name, (number,), reason, logprobs=found)


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 99)), max_size=40),
    st.sampled_from(ENDS),
    st.floats(0, HOLD_SECONDS / 4),
)
def test_nothing_is_lost_or_told_out_of_order(steps, end, seconds):
    bundles = Bundles()
    for name in NAMES:
        bundles.open(request(name))
    sent: dict[str, list[int]] = {name: [] for name in NAMES}
    told: list[TokenEvent] = []
    now = 100.0
    for name, number in steps:
        now += seconds
        sent[name].append(number)
        told += bundles.take([token(name, number)], now)
    for name in NAMES:
        if end in (FinishReason.LENGTH, FinishReason.STOP):
            sent[name].append(7)
            told += bundles.take([token(name, 7, end)], now)
        else:
            told += bundles.take([TokenEvent(name, (), end, "why")], now)
    for name in NAMES:
        events = [event for event in told if event.request_id == name]
        tokens = [one for event in events for one in event.token_ids]
        assert tokens == sent[name]
        assert [found.token_id for event in events for found in event.logprobs or ()] == tokens
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish_reason is end
    streamed = [event for event in told if event.request_id == "streamed" and event.token_ids]
    assert all(len(event.token_ids) == 1 for event in streamed)


def test_the_first_token_is_told_at_once_and_later_ones_after_a_while():
    bundles = Bundles()
    bundles.open(request("whole"))
    assert bundles.take([], 10.0) == []
    first = token("whole", 1)
    assert bundles.take([first], 10.1) == [first]
    assert bundles.take([token("whole", 2)], 10.15) == []
    assert bundles.take([token("whole", 3)], 10.2) == []
    (both,) = bundles.take([], 10.0 + HOLD_SECONDS)
    assert both.token_ids == (2, 3)
    assert bundles.take([], 11.0) == []


def test_an_error_keeps_its_words_apart_from_the_tokens_before_it():
    bundles = Bundles()
    bundles.open(request("whole"))
    bundles.take([token("whole", 1)], 0.0)
    bundles.take([token("whole", 2)], 0.1)
    failed = TokenEvent("whole", (), FinishReason.ERROR, "no memory")
    held, last = bundles.take([failed], 0.1)
    assert held.token_ids == (2,)
    assert held.finish_reason is None
    assert last is failed
