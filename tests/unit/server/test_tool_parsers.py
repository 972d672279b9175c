"""Calls are found in what models write, however their answer is cut into pieces."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaserve.server.tools.choose import PARSERS, format_of
from deltaserve.server.tools.events import Argued, Called, Event, Said, ToolParser, join
from deltaserve.server.tools.forced import ForcedCall, ForcedCalls

WEATHER = '{"city": "Köln \\"am\\" Rhein}", "days": [1, {"a": "]"}]}'
CALL = [Called("weather"), Argued(WEATHER)]
MORE = [Called("time"), Argued("{}")]

HERMES = {
    "plain": ("Just text.\n", [Said("Just text.\n")]),
    "nothing": ("", []),
    "one": (f'<tool_call>\n{{"name": "weather", "arguments": {WEATHER}}}\n</tool_call>', CALL),
    "text, two calls, an end": (
        f'I look.\n\n<tool_call>{{"arguments": {WEATHER}, "name": "weather"}}</tool_call>\n'
        '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>\n',
        [Said("I look."), *CALL, *MORE],
    ),
    "text behind": (
        '<tool_call>{"name": "time"}</tool_call> Now you know. ',
        [*MORE, Said(" Now you know.")],
    ),
    "arguments as text, or none": (
        '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>'
        '<tool_call>{"name":"g","arguments":null,"id":7}</tool_call>',
        [Called("f"), Argued('{"a": 1}'), Called("g"), Argued("{}")],
    ),
    "without an end": (f'<tool_call>{{"name": "weather", "arguments": {WEATHER}}}', CALL),
    "cut off in the arguments": (
        '<tool_call>{"name": "weather", "arguments": {"city": "K',
        [Called("weather"), Argued('{"city": "K')],
    ),
    "cut off in the name": ('Hm <tool_call>{"name": "wea', [Said('Hm <tool_call>{"name": "wea')]),
    "no call": (
        "use the <tool_call> tag, or <tool_cal",
        [Said("use the <tool_call> tag, or <tool_cal")],
    ),
    "no name": ('<tool_call>{"a": 1}</tool_call>', [Said('<tool_call>{"a": 1}</tool_call>')]),
    "broken": (
        '<tool_call>{"name": x}</tool_call>', [Said('<tool_call>{"name": x}</tool_call>')]
    ),
}  # fmt: skip
LLAMA = {
    "plain": ("Just text.", [Said("Just text.")]),
    "nothing": ("", []),
    "one": (f'{{"name": "weather", "parameters": {WEATHER}}}', CALL),
    "tagged": (f'<|python_tag|>{{"name": "weather", "parameters": {WEATHER}}}', CALL),
    "typed": (f'{{"type": "function", "name": "weather", "parameters": {WEATHER}}}\n', CALL),
    "several": (
        f'{{"name": "weather", "parameters": {WEATHER}}}; {{"name": "time", "parameters": {{}}}}',
        [*CALL, *MORE],
    ),
    "an answer in JSON": ('{"name": "Bob", "age": 5}', [Said('{"name": "Bob", "age": 5}')]),
    "numbers": (' {"parameters": 5, "x": 1} y', [Said(' {"parameters": 5, "x": 1} y')]),
    "text that begins like the tag": ("<|pyt", [Said("<|pyt")]),
    "text behind": ('{"name": "time", "parameters": {}} So.', [*MORE, Said(" So.")]),
    "cut off": ('{"name": "weather", "par', [Said('{"name": "weather", "par')]),
    "an object later": ('Say {"name": "f", "parameters": {}}',
                        [Said('Say {"name": "f", "parameters": {}}')]),
}  # fmt: skip
MISTRAL = {
    "plain": ("Just [TOOL] text.", [Said("Just [TOOL] text.")]),
    "array": (
        f'[TOOL_CALLS] [{{"name": "weather", "arguments": {WEATHER}}}, '
        '{"name": "time", "arguments": {}, "id": "abcdefghi"}]',
        [*CALL, *MORE],
    ),
    "newer": (
        f"Let me see.[TOOL_CALLS]weather[ARGS]{WEATHER}[TOOL_CALLS]time{{}}",
        [Said("Let me see."), *CALL, *MORE],
    ),
    "with ids": (f"[TOOL_CALLS]weather[CALL_ID]a1B2c3D4e[ARGS]{WEATHER}", CALL),
    "cut off": ('[TOOL_CALLS][{"name": "weather", "arguments": {"c',
                [Called("weather"), Argued('{"c')]),
    "cut off in the name": ("[TOOL_CALLS]wea", [Said("[TOOL_CALLS]wea")]),
    "no call": ("[TOOL_CALLS][1, 2]", [Said("[TOOL_CALLS][1, 2]")]),
    "nothing behind": ("[TOOL_CALLS]", [Said("[TOOL_CALLS]")]),
    "no name at all": ("[TOOL_CALLS] " + "so " * 100, [Said("[TOOL_CALLS] " + "so " * 100)]),
}  # fmt: skip
RECORDED = [
    pytest.param(name, text, events, id=f"{name}: {case}")
    for name, cases in (("hermes", HERMES), ("llama3_json", LLAMA), ("mistral", MISTRAL))
    for case, (text, events) in cases.items()
]


def read(parser: ToolParser, pieces: list[str]) -> list[Event]:
    events = [event for piece in pieces for event in parser.push(piece)]
    return join(events + parser.finish())


@pytest.mark.parametrize(("name", "text", "expected"), RECORDED)
def test_recorded_answers_split_at_every_position(
    name: str, text: str, expected: list[Event]
) -> None:
    assert read(PARSERS[name](), [text]) == expected
    assert read(PARSERS[name](), list(text)) == expected
    for position in range(len(text)):
        assert read(PARSERS[name](), [text[:position], text[position:]]) == expected


def test_a_call_is_told_before_it_is_complete() -> None:
    parser = PARSERS["hermes"]()
    parser.push('<tool_call>{"name": "weather", ')
    assert parser.push('"arguments": {"city": "Kö') == [Called("weather"), Argued('{"city": "Kö')]
    assert parser.push("ln") == [Argued("ln")]
    assert parser.push(' is"') == [Argued(' is"')]


def test_forced_calls() -> None:
    text = (
        f'[{{"name": "weather", "parameters": {WEATHER}}}, {{"name": "time", "parameters": {{}}}}]'
    )
    assert read(ForcedCalls(), [text]) == read(ForcedCalls(), list(text)) == [*CALL, *MORE]
    assert read(ForcedCall("weather"), list(WEATHER)) == CALL


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)
calls = st.lists(
    st.tuples(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.dictionaries(st.text(), values)),
    min_size=1,
    max_size=3,
)


def written(name: str, made: list[tuple[str, dict]], escape: bool) -> str:
    def dump(value: object) -> str:
        return json.dumps(value, ensure_ascii=escape)

    if name == "hermes":
        return "".join(
            f"<tool_call>\n{dump({'name': n, 'arguments': a})}\n</tool_call>" for n, a in made
        )
    if name == "mistral":
        return "[TOOL_CALLS]" + dump([{"name": n, "arguments": a} for n, a in made])
    return "; ".join(dump({"name": n, "parameters": a}) for n, a in made)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(PARSERS)),
    made=calls,
    escape=st.booleans(),
    cuts=st.lists(st.integers(0, 400), max_size=6),
)
def test_any_calls_are_read_as_they_were_made(
    name: str, made: list[tuple[str, dict]], escape: bool, cuts: list[int]
) -> None:
    text = written(name, made, escape)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    events = read(PARSERS[name](), [text[a:b] for a, b in itertools.pairwise(places)])
    found = [event.name for event in events if isinstance(event, Called)]
    arguments = [json.loads(event.text) for event in events if isinstance(event, Argued)]
    assert list(zip(found, arguments, strict=True)) == made
    assert len(events) == 2 * len(made)


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(list(PARSERS)),
    parts=st.lists(
        st.sampled_from(
            ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>",
             '{"name": "f"', ', "arguments": ', ', "parameters": ', "{", "}", "[", "]", '"', "\\",
             ",", ":", " ", "x", ";"]
        ),
        max_size=12,
    ),
)  # fmt: skip
def test_whatever_is_written_pieces_and_whole_agree(name: str, parts: list[str]) -> None:
    whole = read(PARSERS[name](), ["".join(parts)])
    assert read(PARSERS[name](), parts) == whole
    assert read(PARSERS[name](), list("".join(parts))) == whole


def test_long_arguments_take_linear_time() -> None:
    text = '{"name": "f", "parameters": {"a": "' + "x" * 300_000 + '"}}'
    assert len(read(PARSERS["llama3_json"](), [text])) == 2


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, None),
        ("{{ messages }}", None),
        ("{% if tools %}<tools></tools> answer in <tool_call></tool_call>{% endif %}", "hermes"),
        ("{{ '[AVAILABLE_TOOLS]' }}{{ tools }}{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{% if tools %}<|start_header_id|> {{ '\"parameters\": ' }}{% endif %}", "llama3_json"),
        ("{% if tools %}{{ tools }}{% endif %}", None),
    ],
)
def test_templates_show_their_format(template: str | None, name: str | None) -> None:
    assert format_of(template) == name
