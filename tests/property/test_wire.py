"""Every message arrives as it was sent, and nothing else arrives."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltaserve import errors
from deltaserve.config import EngineConfig
from deltaserve.engine.messages import Command, Failed, Failure, Report, Stepped, Submit
from deltaserve.engine.types import EngineRequest, SamplingParams, TokenEvent
from deltaserve.engine.wire import decode, encode
from deltaserve.errors import DeltaServeError, RequestError

MESSAGES = get_args(Command | Report)
ERRORS = [kind for kind in vars(errors).values() if isinstance(kind, type)]
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NAME = st.from_regex(r"\A[a-z][a-z0-9]{0,8}\Z")
INT = st.integers(-(2**63), 2**63 - 1)
FLOAT = st.floats(allow_nan=False)  # which differs from itself; minus infinity is a logprob
JSON = st.recursive(
    st.none() | st.booleans() | INT | FLOAT | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)

st.register_type_strategy(str, TEXT)
st.register_type_strategy(int, INT)
st.register_type_strategy(float, FLOAT)
CONFIG = st.builds(
    EngineConfig,
    base=NAME,
    served_model_name=NAME,
    max_num_seqs=st.integers(1, 64),
    max_num_batched_tokens=st.integers(64, 4096),
    dtype=st.sampled_from(["auto", "bfloat16"]),
    kv_cache_memory_bytes=st.none() | st.integers(1, 2**40),
)
st.register_type_strategy(EngineConfig, CONFIG)


def messages(kind: type) -> st.SearchStrategy[Any]:
    free = {"state": st.none() | st.dictionaries(TEXT, JSON)}
    return st.builds(kind, **{f.name: free[f.name] for f in fields(kind) if f.name in free})


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
@given(data=st.data())
def test_messages_arrive_as_they_were_sent(kind: type, data: st.DataObject) -> None:
    message = data.draw(messages(kind))
    arrived = decode(encode(message))
    assert type(arrived) is kind
    assert arrived == message


@given(st.lists(st.builds(TokenEvent), max_size=64))
def test_a_step_is_one_message_whatever_it_produced(events: list[TokenEvent]) -> None:
    frames = encode(Stepped(tuple(events)))
    assert len(frames) == 2
    assert decode(frames).events == tuple(events)


@pytest.mark.parametrize("kind", ERRORS)
@given(message=TEXT, param=st.none() | TEXT, seconds=st.integers(1, 300))
def test_errors_arrive_as_their_own_class(
    kind: type[DeltaServeError], message: str, param: str | None, seconds: int
) -> None:
    known = {"param": param, "retry_after_s": seconds, "limit": "rpm_limit"}
    details = {k: v for k, v in known.items() if k in inspect.signature(kind.__init__).parameters}
    error = kind(message, **details)
    (frame, payload) = encode(Failed(Failure.of(error)))
    arrived = decode([frame, payload]).failure.error()
    assert type(arrived) is kind
    assert str(arrived) == message
    assert vars(arrived) == details


def test_foreign_exceptions_arrive_as_the_engines_end() -> None:
    arrived = Failure.of(ZeroDivisionError("division by zero")).error()
    assert isinstance(arrived, errors.EngineDeadError)
    assert str(arrived) == "the engine failed: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "frames",
    [
        [b"Popen", b"\x80"],  # no such message
        [b"Abort", b"\x80"],  # a field is missing
        [b"Abort", b"\x81\xaarequest_id\x01"],  # of another type
        [b"Abort", b"\x80\x04cos\nsystem\n"],  # no MessagePack at all
    ],
)
def test_what_is_no_message_is_refused(frames: list[bytes]) -> None:
    with pytest.raises((KeyError, msgspec.DecodeError)):
        decode(frames)


def test_half_a_character_is_the_senders_fault() -> None:
    request = EngineRequest("a", "base", (1,), SamplingParams(max_tokens=1), cache_salt="\ud800")
    with pytest.raises(RequestError, match="not valid Unicode"):
        encode(Submit(request))
