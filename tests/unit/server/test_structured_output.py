"""Every way to say what an answer must match reaches the engine as one grammar, or is refused."""

from __future__ import annotations

import json

import pytest
from test_bad_requests import CHAT, COMPLETION, COMPLETIONS, CONVERSATION, refused

from deltaserve.engine.types import Grammar
from deltaserve.server.grammars import MAX_GRAMMAR_LENGTH

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_SCHEMA = Grammar("json_schema", json.dumps(SCHEMA))
ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')
YES_NO = Grammar("lark", 'start: "yes" | "n\\"o"')
ONE = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}

ASKED = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
    ({"response_format": ONE}, AS_SCHEMA),
    ({"guided_json": SCHEMA}, AS_SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, AS_SCHEMA),
    ({"guided_regex": "a+"}, Grammar("regex", "a+")),
    ({"guided_choice": ["yes", 'n"o']}, YES_NO),
    ({"guided_grammar": 'start: "x"'}, Grammar("lark", 'start: "x"')),
    ({"structured_outputs": {"json": SCHEMA}}, AS_SCHEMA),
    ({"structured_outputs": {"regex": "a+", "disable_fallback": True}}, Grammar("regex", "a+")),
    ({"structured_outputs": {"choice": ["yes", 'n"o']}}, YES_NO),
    ({"structured_outputs": {"grammar": 'start: "x"'}}, Grammar("lark", 'start: "x"')),
    ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
]


@pytest.mark.parametrize(("asked", "grammar"), ASKED)
def test_every_field_reaches_the_engine(http, engine, asked, grammar):
    for path, body in ((COMPLETIONS, COMPLETION), (CHAT, CONVERSATION)):
        http.post(path, json=body | asked).raise_for_status()
    assert [request.sampling.grammar for request in engine.submitted] == [grammar, grammar]


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "json": SCHEMA}}, "structured_outputs.regex"),
        ({"response_format": ONE, "guided_regex": "a"}, "guided_regex"),
        ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids"),
    ],
)
def test_contradictions_are_refused(http, engine, asked, param):
    refused(http.post(COMPLETIONS, json=COMPLETION | asked), param=param)
    assert engine.submitted == []


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"guided_json": {"const": "x" * MAX_GRAMMAR_LENGTH}}, "guided_json"),
        ({"guided_choice": ["x" * MAX_GRAMMAR_LENGTH]}, "guided_choice"),
        ({"guided_regex": "a("}, "guided_regex"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_grammar": "start: missing"}, "guided_grammar"),
        ({"guided_json": {"type": "nope"}}, "guided_json"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": 5}, "guided_json"),
        ({"guided_json": {"allOf": [{"type": "string"}, {"type": "null"}]}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice.0"),
        ({"guided_choice": [""]}, "guided_choice.0"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "text", "x": 1}}, "response_format.x"),
        ({"response_format": "json_object"}, "response_format"),
        ({"structured_outputs": {"xml": 1}}, "structured_outputs.xml"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": "["}}, "structured_outputs.regex"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [400]}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids.0"),
    ],
)
def test_what_is_no_grammar_is_refused_before_it_queues(http, engine, asked, param):
    message = refused(http.post(COMPLETIONS, json=COMPLETION | asked), param=param)
    assert "\n" not in message
    assert engine.submitted == []


def test_allowed_tokens_reach_the_engine(client, engine):
    client.completions.create(model="base", prompt="a", extra_body={"allowed_token_ids": [5, 7]})
    assert engine.submitted[0].sampling.allowed_token_ids == (5, 7)
