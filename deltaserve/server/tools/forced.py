"""Calls that the client insists on: a grammar makes the model write them, as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import ClassVar

from deltaserve.engine.grammar import WHITESPACE
from deltaserve.engine.types import Grammar
from deltaserve.server.messages import Function
from deltaserve.server.tools.array import CallArray
from deltaserve.server.tools.events import Argued, Called, Event, join


def some_calls(functions: Sequence[Function], *, several: bool) -> Grammar:
    """``[{"name": ..., "parameters": ...}, ...]`` of these functions. Each schema is a document of
    its own, so that its references mean what they say."""
    rules = []
    for number, function in enumerate(functions):
        head = json.dumps(f'{{"name": {json.dumps(function.name)}, "parameters": ')
        schema = json.loads(function.schema_text)
        schema.setdefault("x-guidance", {"whitespace_pattern": WHITESPACE})
        rules.append(f'call_{number}: {head} %json {json.dumps(schema)} "}}"')
    call = " | ".join(f"call_{number}" for number in range(len(functions)))
    more = '(", " call)*' if several else ""
    return Grammar("lark", "\n".join([f'start: "[" call {more} "]"', f"call: {call}", *rules]))


def one_call(function: Function) -> Grammar:
    """The arguments alone."""
    return Grammar("json_schema", function.schema_text)


class ForcedCalls:
    """The ToolParser of ``some_calls``."""

    markers: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._array = CallArray()

    def push(self, text: str) -> list[Event]:
        return join(self._array.push(text)[0])

    def finish(self) -> list[Event]:
        return []


class ForcedCall:
    """The ToolParser of ``one_call``."""

    markers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = False

    def push(self, text: str) -> list[Event]:
        if not text:
            return []
        begin: list[Event] = [] if self._started else [Called(self._name)]
        self._started = True
        return [*begin, Argued(text)]

    def finish(self) -> list[Event]:
        return []
