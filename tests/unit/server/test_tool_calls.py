"""Tools through the official client: what the model is told, and what is made of its answer."""

from __future__ import annotations

import json

import openai
import pytest
from fake_engine import FakeEngine
from test_bad_requests import CHAT, CONVERSATION, refused
from test_openai_client import scripted

from deltaserve.engine.types import FinishReason, TokenEvent

PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "$defs": {"City": {"type": "string", "maxLength": 8}},
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}
TIME = {"type": "function", "function": {"name": "time", "description": "now", "strict": True}}
ASK = {"model": "chatty", "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, TIME]}
ANSWER = (
    'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
CALLS = [("weather", '{"city": "Köln"}'), ("time", "{}")]


@pytest.fixture(autouse=True)
def room(engine: FakeEngine) -> None:
    engine.max_model_len = 2000


@pytest.fixture
def say(engine: FakeEngine, tokenizers):
    """Let the model answer with a text."""

    def answer(text: str, reason: FinishReason = FinishReason.STOP) -> None:
        ids = tokenizers["chatty"].encode(text)

        def script(request):
            for token in ids:
                yield TokenEvent(request.request_id, (token,))
            end = (2,) if reason is FinishReason.STOP else ()
            yield TokenEvent(request.request_id, end, reason)

        engine.script = script

    return answer


def whole_and_streamed(client: openai.OpenAI, **ask):
    """(content, [(name, arguments)], finish reason); the same both ways."""
    choice = client.chat.completions.create(**ask).choices[0]
    calls = [(c.function.name, c.function.arguments) for c in choice.message.tool_calls or []]
    whole = (choice.message.content, calls, choice.finish_reason)
    content, names, arguments, ids, reason = "", {}, {}, set(), None
    for chunk in client.chat.completions.create(**ask, stream=True):
        delta, reason = chunk.choices[0].delta, chunk.choices[0].finish_reason
        content += delta.content or ""
        for call in delta.tool_calls or []:
            if call.id is not None:
                assert call.type == "function"
                ids.add(call.id)
                names[call.index], arguments[call.index] = call.function.name, ""
            arguments[call.index] += call.function.arguments
    assert len(ids) == len(names)
    assert [(names[i], arguments[i]) for i in range(len(names))] == calls
    assert (content or None, reason) == (whole[0] or None, whole[2])
    return whole


def test_calls_are_found_and_told(client, say, engine, tokenizers):
    say(ANSWER)
    assert whole_and_streamed(client, **ASK) == ("Let me see.", CALLS, "tool_calls")
    prompt = tokenizers["chatty"].decode(engine.submitted[0].prompt_ids)
    told = json.loads(prompt.partition("tools: ")[2].partition("\n")[0])
    assert told[0] == WEATHER
    assert told[1]["function"] == {"name": "time", "description": "now"}
    assert engine.submitted[0].sampling.grammar is None


def test_an_answer_without_calls_is_text(client, say):
    say("No need. ")
    assert whole_and_streamed(client, **ASK) == ("No need. ", [], "stop")


def test_a_call_that_was_cut_off_ended_for_length(client, say):
    say(ANSWER[:60], FinishReason.LENGTH)
    content, calls, reason = whole_and_streamed(client, **ASK)
    assert (content, reason) == ("Let me see.", "length")
    assert "weather".startswith(calls[0][0])


def test_one_call_where_several_are_not_wanted(client, say):
    say(ANSWER)
    found = whole_and_streamed(client, **ASK, parallel_tool_calls=False)
    assert found == ("Let me see.", CALLS[:1], "tool_calls")


def test_none_hides_the_tools(client, say, engine, tokenizers):
    say(ANSWER)
    assert whole_and_streamed(client, **ASK, tool_choice="none") == (ANSWER, [], "stop")
    assert "tools: " not in tokenizers["chatty"].decode(engine.submitted[0].prompt_ids)


def test_several_choices_have_calls_of_their_own(client, say):
    say(ANSWER)
    choices = client.chat.completions.create(**ASK, n=3).choices
    assert [len(choice.message.tool_calls) for choice in choices] == [2, 2, 2]
    assert len({call.id for choice in choices for call in choice.message.tool_calls}) == 6


def test_logprobs_of_tokens_within_calls(client, engine, tokenizers):
    ids = tokenizers["chatty"].encode(ANSWER)

    def script(request):
        from fake_engine import scored

        for i, token in enumerate(ids):
            reason = FinishReason.LENGTH if i == len(ids) - 1 else None
            yield TokenEvent(request.request_id, (token,), reason, logprobs=scored(token, 0))

    engine.script = script
    whole = client.chat.completions.create(**ASK, logprobs=True).choices[0]
    assert len(whole.logprobs.content) == len(ids)
    found = 0
    for chunk in client.chat.completions.create(**ASK, logprobs=True, stream=True):
        logprobs = chunk.choices[0].logprobs
        found += len(logprobs.content) if logprobs else 0
    assert found == len(ids)


def test_a_required_call_is_written_as_json(client, say, engine):
    first = '{"name": "weather", "parameters": {"city": "Köln"}}'
    say(f'[{first}, {{"name": "time", "parameters": {{}}}}]')
    assert whole_and_streamed(client, **ASK, tool_choice="required") == (None, CALLS, "tool_calls")
    grammar = engine.submitted[0].sampling.grammar
    assert grammar.kind == "lark"
    assert "call_0 | call_1" in grammar.text


def test_a_named_call_is_its_arguments(client, say, engine):
    say('{"city": "Köln"}')
    choice = {"type": "function", "function": {"name": "weather"}}
    found = whole_and_streamed(client, **ASK, tool_choice=choice)
    assert found == (None, CALLS[:1], "tool_calls")
    grammar = engine.submitted[0].sampling.grammar
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", PARAMETERS)


def test_a_whole_conversation_with_tools(client, say, engine, tokenizers):
    say(ANSWER)
    turn = client.chat.completions.create(**ASK).choices[0].message
    messages = [*ASK["messages"], turn]
    for call in turn.tool_calls:
        messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    engine.submitted.clear()
    client.chat.completions.create(**ASK | {"messages": messages})
    prompt = tokenizers["chatty"].decode(engine.submitted[0].prompt_ids)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}' in prompt
    assert prompt.count("tool: sunny") == 2


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("tools.0.function", {"tools": [{"type": "function"}]}),
        ("tools.0.type", {"tools": [{"type": "web_search", "function": {"name": "f"}}]}),
        ("tools.0.function.name", {"tools": [{"type": "function", "function": {"name": "a b"}}]}),
        ("tools.0.function.mood",
         {"tools": [{"type": "function", "function": {"name": "f", "mood": 1}}]}),
        ("tools", {"tools": [WEATHER, WEATHER]}),
        ("tools", {"tool_choice": "required", "tools": [{"type": "function", "function": {
            "name": "f", "parameters": {"type": "nope"}}}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": "always", "tools": [TIME]}),
        ("tool_choice", {"tool_choice": {"type": "function", "function": {"name": "x"}},
                         "tools": [TIME]}),
        ("tool_choice", {"tool_choice": "required", "tools": [TIME],
                         "response_format": {"type": "json_object"}}),
        ("tool_choice", {"tool_choice": "required", "tools": [TIME], "allowed_token_ids": [5]}),
        ("functions", {"functions": [{"name": "f"}]}),
        ("messages.0.tool_calls", {"messages": [{"role": "user", "content": "x", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}),
        ("messages.0.tool_calls.0.function.arguments",
         {"messages": [{"role": "assistant", "tool_calls": [
             {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]}),
        ("messages.0.tool_call_id", {"messages": [{"role": "tool", "content": "x"}]}),
    ],
)  # fmt: skip
def test_bad_tools_are_refused_by_name(http, engine, param, body):
    refused(http.post(CHAT, json=CONVERSATION | body), param=param)
    assert engine.submitted == []


def test_a_special_token_may_mark_calls(client, engine, tokenizers, model_dirs):
    """Mistral's marker is one; it must be seen, and others must not."""
    decoder = tokenizers["chatty"].showing(["<end>"])
    ids = [0, 2, *tokenizers["chatty"].encode("x")]
    assert decoder.decode([t for t in ids if t not in decoder.special_ids]) == "<end>x"
    assert tokenizers["chatty"].showing(["no such"]) is tokenizers["chatty"]
    engine.script = scripted(ids)
    assert client.chat.completions.create(**ASK).choices[0].message.content == "x"
