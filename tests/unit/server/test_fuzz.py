"""Nothing that a client can send is an internal error, and the served schema says what it can."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import openai
import pytest
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import running
from test_bad_requests import CHAT, COMPLETION, COMPLETIONS, CONVERSATION, refused

from deltaserve.config import EngineConfig, ServerConfig
from deltaserve.server.app import create_app
from deltaserve.server.tokenizers import Tokenizers
from tests.process_helpers import wait_until

TOKENIZE, DETOKENIZE = "/v1/tokenize", "/v1/detokenize"
EMBEDDINGS = "/v1/embeddings"
KNOWN = {
    COMPLETIONS: COMPLETION,
    CHAT: CONVERSATION,
    TOKENIZE: {"prompt": "x"},
    DETOKENIZE: {"tokens": [5]},
    EMBEDDINGS: {"model": "base", "input": "x"},
}
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@pytest.fixture(scope="session")
def schema(url: str) -> dict:
    return httpx.get(f"{url}/openapi.json").raise_for_status().json()


def properties(schema: dict, path: str) -> list[str]:
    """The fields of a route's body, as the schema tells."""
    content = schema["paths"][path]["post"]["requestBody"]["content"]["application/json"]
    refs = [item["$ref"] for item in content["schema"].get("anyOf", [content["schema"]])]
    models = [schema["components"]["schemas"][ref.rpartition("/")[2]] for ref in refs]
    return sorted({name for model in models for name in model["properties"]})


def answered(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404, 413, 415), response.text
    if response.status_code != 200:
        refused(response, response.status_code)


def test_the_schema_has_every_route_and_loads_nothing_from_elsewhere(http, schema):
    assert set(KNOWN) <= schema["paths"].keys()
    for path in KNOWN:
        assert properties(schema, path)
    assert schema["components"]["schemas"]["ChatRequest"]["additionalProperties"] is False
    for page in ("/docs", "/redoc"):
        refused(http.get(page), 404)
    found = set(json.dumps(schema).split('"$ref": "')[1:])
    for reference in {text.partition('"')[0].rpartition("/")[2] for text in found}:
        assert reference in schema["components"]["schemas"]


@FUZZ
@given(data=st.data(), path=st.sampled_from(list(KNOWN)), value=json_values)
def test_no_value_of_any_field_is_an_internal_error(http, schema, data, path, value):
    field = data.draw(st.sampled_from(properties(schema, path)))
    body = json.dumps(KNOWN[path] | {field: value})
    answered(http.post(path, content=body, headers={"content-type": "application/json"}))


tools = st.lists(
    st.fixed_dictionaries(
        {"type": st.sampled_from(["function", "x"])},
        optional={
            "function": st.fixed_dictionaries(
                {"name": st.sampled_from(["f", "g", "", "a b"])},
                optional={"parameters": json_values, "strict": st.booleans()},
            )
        },
    ),
    max_size=3,
)


@FUZZ
@given(
    tools=tools,
    choice=st.sampled_from(
        ["auto", "none", "required", {"type": "function", "function": {"name": "f"}}, {}, 5]
    ),
    calls=json_values,
)
def test_no_tools_are_an_internal_error(http, tools, choice, calls):
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "1", "content": "y"},
    ]
    body = {"model": "chatty", "messages": messages, "tools": tools, "tool_choice": choice}
    for part in (body, body | {"messages": messages[:1]}):
        content = json.dumps(part)
        answered(http.post(CHAT, content=content, headers={"content-type": "application/json"}))


@FUZZ
@given(path=st.sampled_from(list(KNOWN)), body=st.binary(max_size=200) | st.text().map(str.encode))
def test_no_bytes_are_an_internal_error(http, path, body):
    answered(http.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("path", list(KNOWN))
@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' * 50_000, b"[" * 100_000, b'"\\ud800"', b"1" * 100_000, b'{"model": 1e999}',
        json.dumps({"model": "chatty", "prompt": ["x"] * 100_000}).encode(),
        json.dumps({"model": "chatty", "prompt": [5] * 500_000, "tokens": [5] * 500_000}).encode(),
        json.dumps({"model": "chatty", "messages": [{"role": "user"}] * 50_000}).encode(),
        json.dumps({"model": "chatty", "messages": [{"role": "user", "content": "x"}] * 9999,
                    "tools": [{}] * 9999, "stop": ["x"] * 9999}).encode(),
    ],
)  # fmt: skip
def test_deep_and_huge_bodies(http, path, body):
    began = time.monotonic()
    answered(http.post(path, content=body, headers={"content-type": "application/json"}))
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: abc\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 99999999999999999999\r\n\r\n",
        b"GET /v1/models/%ff%00%2e%2e HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
)
def test_odd_heads(url, engine, head):
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head)
        status = connection.recv(100).split(b" ")
    assert not status[1:2] or 200 <= int(status[1]) < 500


@pytest.fixture(scope="module")
def hurried_url(_engine: FakeEngine, all_tokenizers: Tokenizers) -> Iterator[str]:
    config = ServerConfig(EngineConfig("base"), request_timeout_s=0.3, max_body_bytes=1000)
    with running(create_app(_engine, all_tokenizers, config)) as url:
        yield url


def test_answers_that_take_too_long_end_with_an_error(hurried_url, engine):
    engine.pause = 0.05
    with openai.OpenAI(base_url=f"{hurried_url}/v1", api_key="x", max_retries=0) as client:
        ask = {"model": "base", "prompt": [5] * 50, "max_tokens": 50}
        with pytest.raises(
            openai.InternalServerError, match=r"not complete after 0\.3 s"
        ) as caught:
            client.completions.create(**ask)
        assert (caught.value.status_code, caught.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match="not complete"):
            list(client.completions.create(**ask, stream=True, n=2))
    # The client has its error before the stream is closed here.
    asked = {request.request_id for request in engine.submitted}
    wait_until(lambda: set(engine.aborted) == asked and not engine.streaming, 10)


def test_bodies_that_do_not_come_are_not_waited_for(hurried_url, engine):
    host, port = hurried_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 900\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(100)
    with httpx.Client(base_url=hurried_url) as http:
        refused(http.post(COMPLETIONS, json=COMPLETION | {"prompt": "x" * 1000}), 413)
        assert http.post(COMPLETIONS, json=COMPLETION).status_code == 200


def test_the_knobs_are_checked():
    from deltaserve.errors import ConfigError

    for wrong in ({"request_timeout_s": 0.0}, {"max_body_bytes": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(ServerConfig(EngineConfig("base")), **wrong)
