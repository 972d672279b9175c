"""Mistral's formats: ``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, and since version
11 of its tokenizer ``[TOOL_CALLS]name[ARGS]{...}``, once for each call."""

from __future__ import annotations

import re
from typing import ClassVar

from deltaserve.server.tools.array import CallArray
from deltaserve.server.tools.events import Argued, Called, Event
from deltaserve.server.tools.marked import MarkedCalls
from deltaserve.server.tools.reader import ValueScanner

ARGS, CALL_ID = "[ARGS]", "[CALL_ID]"
HEAD = re.compile(r"\s*([\w.-]+)\s*(?:\[CALL_ID\][\w-]*\s*)?(?:\[ARGS\])?\s*\{", re.ASCII)
MAX_HEAD = 256
"""Characters between the marker and the arguments."""


class MistralParser(MarkedCalls):
    marker: ClassVar[str] = "[TOOL_CALLS]"
    markers: ClassVar[tuple[str, ...]] = (marker, ARGS, CALL_ID)

    def __init__(self) -> None:
        super().__init__()
        self._head = ""
        self._array: CallArray | None = None
        self._arguments: ValueScanner | None = None

    def _push_call(self, text: str) -> tuple[list[Event], str | None]:
        if self._arguments is not None:
            return self._push_arguments(text, [])
        if self._array is not None:
            return self._push_array(text)
        for position, char in enumerate(text):
            self._head += char
            rest = text[position + 1 :]
            if self._head.lstrip() == "[":
                self._array = CallArray()
                return self._push_array("[" + rest)
            if match := HEAD.match(self._head):
                self._arguments = ValueScanner("{")
                return self._push_arguments(rest, [Called(match[1]), Argued("{")])
            if len(self._head) > MAX_HEAD:
                return self._finish_call(), rest
        return [], None

    def _push_array(self, text: str) -> tuple[list[Event], str | None]:
        assert self._array is not None
        events, rest = self._array.push(text)
        if not (self._array.done or self._array.failed):
            return events, None
        if self._array.failed:
            events += self._finish_call()
        self._array, self._head = None, ""
        return events, rest

    def _push_arguments(self, text: str, events: list[Event]) -> tuple[list[Event], str | None]:
        assert self._arguments is not None
        for position, char in enumerate(text):
            self._arguments.take(char)
            if self._arguments.done:
                self._arguments, self._head = None, ""
                return [*events, Argued(text[: position + 1])], text[position + 1 :]
        return [*events, Argued(text)], None

    def _finish_call(self) -> list[Event]:
        head, array, arguments = self._head, self._array, self._arguments
        self._head, self._array, self._arguments = "", None, None
        if array is not None:
            return [self._no_call(array.unread)] if array.first else []
        return [self._no_call(head)] if arguments is None else []
