"""What well-behaved clients never send, and clients that leave."""

from __future__ import annotations

import json
import time

import httpx
import pytest
from fake_engine import KEY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaserve.config import ServerConfig
from deltaserve.server.reading import MAX_NODES, check_nodes

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
COMPLETION = {"model": "base", "prompt": "hello"}
CONVERSATION = {"model": "chatty", "messages": [{"role": "user", "content": "hello"}]}


def refused(response, status=400, param=None):
    """An error in OpenAI's shape; gives its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    if param:
        assert error["param"] == param
    assert len(response.headers["x-request-id"]) == 32
    return error["message"]


def post_raw(http, path, body, kind="application/json"):
    return http.post(path, content=body, headers={"content-type": kind})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True),
        ("top_p", 0), ("top_p", 1.01), ("top_k", -2), ("top_k", 1.5), ("top_k", 2**40),
        ("max_tokens", 0), ("max_tokens", -5), ("max_tokens", 2**70), ("n", 0), ("n", 129),
        ("seed", 2**63), ("seed", "x"), ("stop", ""), ("stop", ["a"] * 17), ("stop", 5),
        ("stop", "x" * 5000), ("stream", "yes"), ("model", None), ("model", 7), ("user", 5),
        ("prompt", ""), ("prompt", []), ("prompt", [[]]), ("prompt", None), ("prompt", {"a": 1}),
        ("prompt", [1, "a"]), ("prompt", [-1]), ("prompt", [400]), ("prompt", [[1], [10**30]]),
        ("prompt", [True]), ("prompt", ["a", ""]), ("stream_options", {"include_usage": True}),
    ],
)  # fmt: skip
def test_wrong_values_are_refused_by_name(http, engine, field, value):
    refused(http.post(COMPLETIONS, json=COMPLETION | {field: value}), param=field)
    assert engine.submitted == []


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "9" * 5000])
@pytest.mark.parametrize("field", ["temperature", "top_p", "max_tokens", "seed"])
def test_numbers_that_are_none(http, field, number):
    body = json.dumps(COMPLETION)[:-1] + f', "{field}": {number}}}'
    refused(post_raw(http, COMPLETIONS, body))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bad_words", ["x"]), ("length_penalty", 2), ("best_of", 2), ("suffix", "x"),
        ("top_logprobs", 3),
        ("store", True), ("store", 0),
        ("invented", 1), ("invented", None), ("Temperature", 0),
    ],
)  # fmt: skip
def test_fields_that_are_not_supported_are_refused_by_name(http, engine, field, value):
    body = json.dumps(COMPLETION | {field: value})
    assert field in refused(post_raw(http, COMPLETIONS, body), param=field)
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", float("nan")), ("frequency_penalty", 2.5), ("presence_penalty", -3),
        ("repetition_penalty", 0), ("repetition_penalty", 11), ("min_p", 1.5), ("min_p", -0.1),
        ("min_tokens", -1), ("min_tokens", 1000), ("ignore_eos", "yes"),
        ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", [0] * 129),
        ("logit_bias", {"x": 1}), ("logit_bias", {"99999999": 1}), ("logit_bias", {"-1": 1}),
        ("logit_bias", {"\u0665": 1}), ("logit_bias", {"5": 101}), ("logit_bias", [1]),
        ("logprobs", True), ("logprobs", -1), ("logprobs", 21), ("logprobs", "5"),
        ("prompt_logprobs", -1), ("prompt_logprobs", 21), ("prompt_logprobs", True),
        ("echo", 1), ("return_token_ids", "yes"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_refused(http, engine, field, value):
    body = json.dumps(COMPLETION | {field: value})
    assert field in refused(post_raw(http, COMPLETIONS, body))
    assert engine.submitted == []


def test_fields_without_effect_are_accepted(http):
    neutral = {
        "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": None, "best_of": 1,
        "user": "u", "metadata": {"a": "b"}, "store": False, "logit_bias": {}, "echo": False,
        "suffix": None, "min_p": 0, "stop": None, "n": None, "seed": None, "stream": None,
        "stream_options": None, "ignore_eos": False, "skip_special_tokens": True,
    }  # fmt: skip
    assert http.post(COMPLETIONS, json=COMPLETION | neutral).status_code == 200
    chat = {"tools": None, "tool_choice": "none", "response_format": {"type": "text"},
            "logprobs": False, "top_logprobs": None, "parallel_tool_calls": True}  # fmt: skip
    assert http.post(CHAT, json=CONVERSATION | chat).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", []), ("messages", "hi"), ("messages", None),
        ("messages.0", ["hi"]), ("messages.0.role", [{"content": "x"}]),
        ("messages.0.content", [{"role": "user"}]),
        ("messages.0.content", [{"role": "user", "content": 5}]),
        ("messages.0.content",
         [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages.0.tool_call_id", [{"role": "tool", "content": "x", "tool_call_id": None}]),
        ("messages.0.tool_calls.0.function", [{"role": "assistant", "tool_calls": [{"id": "1"}]}]),
        ("messages.0.mood", [{"role": "user", "content": "x", "mood": "bad"}]),
    ],
)  # fmt: skip
def test_wrong_messages(http, engine, field, value):
    refused(http.post(CHAT, json=CONVERSATION | {"messages": value}), param=field)
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"logprobs": False, "top_logprobs": 1}), ("logprobs", {"logprobs": 3}),
        ("echo", {"echo": True}), ("max_tokens", {"max_tokens": 0}),
        ("prompt_logprobs", {"prompt_logprobs": 1, "stream": True}),
    ],
)  # fmt: skip
def test_what_is_asked_of_tokens_must_make_sense(http, engine, field, body):
    refused(http.post(CHAT, json=CONVERSATION | body), param=field)
    assert engine.submitted == []


def test_nothing_is_generated_only_where_the_prompt_is_answered(http, engine):
    refused(http.post(COMPLETIONS, json=COMPLETION | {"max_tokens": 0}), param="max_tokens")
    refused(
        http.post(COMPLETIONS, json=COMPLETION | {"max_tokens": 0, "echo": False, "logprobs": 1}),
        param="max_tokens",
    )
    for asked in ({"echo": True}, {"prompt_logprobs": 0}):
        http.post(COMPLETIONS, json=COMPLETION | {"max_tokens": 0} | asked).raise_for_status()
    assert [r.sampling.max_tokens for r in engine.submitted] == [0, 0]


def test_conflicting_limits(http):
    body = CONVERSATION | {"max_tokens": 5, "max_completion_tokens": 6}
    refused(http.post(CHAT, json=body), param="max_tokens")


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"\xff\xfe", b"{'model': 1}",
        b'{"model": "base", "prompt": "\\ud800"}', b'{"\\udfff": 1}',
        b'{"model": "\xed\xa0\x80", "prompt": "x"}', b"[" * 100_000, b'{"a":' * 100_000,
        b'{"model": "base", "prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
)  # fmt: skip
def test_malformed_bodies(http, body):
    for path in (COMPLETIONS, CHAT):
        refused(post_raw(http, path, body))


def test_odd_but_valid_json(http):
    twice = b'{"model": "nope", "model": "base", "prompt": "\\ud83d\\ude00\\u0000\\u2028"}'
    response = post_raw(http, COMPLETIONS, twice, "application/json; charset=utf-8")
    assert response.json()["choices"][0]["text"] == "😀\0\u2028"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
FIELDS = ["model", "prompt", "messages", "stop", "stream", "stream_options", "n", "seed", "top_k",
          "max_tokens", "temperature", "metadata", "logit_bias", "tools"]  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from([COMPLETIONS, CHAT]), field=st.sampled_from(FIELDS), value=json_values)
def test_no_value_is_an_internal_error(http, path, field, value):
    known = COMPLETION if path == COMPLETIONS else CONVERSATION
    response = post_raw(http, path, json.dumps(known | {field: value}))
    assert response.status_code in (200, 400, 404)


def test_body_too_large(http):
    large = json.dumps(COMPLETION | {"prompt": "x" * ServerConfig.max_body_bytes})
    refused(post_raw(http, COMPLETIONS, large), 413)
    pieces = (large[i : i + 65536].encode() for i in range(0, len(large), 65536))
    refused(post_raw(http, COMPLETIONS, pieces), 413)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, COMPLETION | {"prompt": [[1]] * MAX_NODES}),
        (COMPLETIONS, COMPLETION | {"metadata": {"a": [{}] * MAX_NODES}}),
        (COMPLETIONS, {f"k{number}": 1 for number in range(MAX_NODES + 1)}),
        (CHAT, CONVERSATION | {"messages": CONVERSATION["messages"] * MAX_NODES}),
        ("/tokenize", {"prompt": "x"} | {f"k{number}": 1 for number in range(MAX_NODES)}),
    ],
)
def test_what_takes_too_long_to_read_is_not_read(http, engine, path, body):
    assert "several requests" in refused(http.post(path, json=body))
    assert engine.submitted == []


def test_brackets_within_texts_are_as_cheap_as_letters():
    check_nodes(json.dumps({"prompt": '{"a": ["\\:]"]}' * MAX_NODES}).encode())
    check_nodes(b'"' + b'\\"{' * 2_000_000)  # a text without an end is read only once


def test_only_json(http):
    refused(post_raw(http, COMPLETIONS, json.dumps(COMPLETION), "text/plain"), 415)
    refused(http.post(COMPLETIONS), 415)


def test_too_many_sequences(http):
    refused(http.post(COMPLETIONS, json=COMPLETION | {"prompt": ["a"] * 100, "n": 100}), param="n")


def test_unknown_routes_and_methods(http):
    refused(http.get("/nope"), 404)
    refused(http.get("/v1/models/"), 404)
    assert refused(http.get(COMPLETIONS), 405)
    assert http.get(COMPLETIONS).headers["allow"] == "POST"


def test_health_and_version(http, engine):
    assert http.get("/health").status_code == 200
    assert http.get("/version").json()["version"]
    engine.dead = True
    refused(http.get("/health"), 503)


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", f"Basic {KEY}", KEY, f"Bearer {KEY}x", b"Bearer \xff"]
)
def test_the_key_guards_v1_only(locked_url, engine, header):
    headers = {} if header is None else {"authorization": header}
    with httpx.Client(base_url=locked_url, headers=headers) as http:
        for path in ("/v1/models", "/v1/none", "/v1", "/v1%2Fmodels"):
            response = http.get(path)
            refused(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        assert http.get("/health").status_code == 200
        right = {"authorization": f"bearer {KEY}"}
        assert http.get("/v1/models", headers=right).status_code == 200


def test_stream_ends_with_done(http):
    response = http.post(COMPLETIONS, json=COMPLETION | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")


def test_errors_before_the_stream_have_a_status(http):
    refused(http.post(COMPLETIONS, json=COMPLETION | {"stream": True, "model": "x"}), 404)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_client_that_leaves_frees_its_work(http, engine, path, n, stream):
    engine.pause = 30 if not stream else 0.05
    body = (COMPLETION if path == COMPLETIONS else CONVERSATION) | {"n": n, "stream": stream}
    if stream:
        with http.stream("POST", path, json=body | {"max_tokens": 50}) as response:
            lines = response.iter_lines()  # kept: a dropped iterator closes the connection
            next(lines)
            assert engine.streaming
    else:
        with pytest.raises(httpx.ReadTimeout):
            http.post(path, json=body, timeout=0.3)
    deadline = time.monotonic() + 2
    wanted = {request.request_id for request in engine.submitted}
    while set(engine.aborted) != wanted or engine.streaming:
        assert time.monotonic() < deadline, (engine.aborted, wanted, engine.streaming)
        time.sleep(0.01)
    assert len(wanted) == n
