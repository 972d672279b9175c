"""JSON that arrives a few characters at a time: where values end, and calls written as objects."""

from __future__ import annotations

import json
from enum import Enum, auto
from typing import Any

from deltaserve.server.tools.events import Argued, Called, Event

SPACE = " \n\r\t"
ARGUMENT_KEYS = ("arguments", "parameters")


class ValueScanner:
    """Finds the end of a JSON value from its brackets and quotes; it need not be valid."""

    def __init__(self, first: str) -> None:
        self.first = first
        self.done = False
        self._depth = int(first in "{[")
        self._in_string = first == '"'
        self._escaped = False

    def take(self, char: str) -> bool:
        """Whether the next character belongs to the value."""
        if self.first not in '{["':  # a number or a word: it ends where something else begins
            self.done = char in SPACE or char in ",}]"
            return not self.done
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = char == "\\"
            self._in_string = char != '"'
            self.done = char == '"' and self._depth == 0
        else:
            self._in_string = char == '"'
            self._depth += (char in "{[") - (char in "}]")
            self.done = self._depth == 0
        return True


class _Expects(Enum):
    START = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    INSIDE = auto()
    NEXT = auto()


class CallReader:
    """One ``{"name": ..., "arguments": {...}}``. Arguments are passed on as they are written.

    done: it was read to its end. failed: it is no call; ``raw`` is what it was so far.
    """

    def __init__(self, *, needs_arguments: bool = False) -> None:
        """needs_arguments: without them an object with a name is no call."""
        self.done = self.failed = self.started = False
        self._raw: list[str] = []  # until it is a call
        self._needs_arguments = needs_arguments
        self._expects = _Expects.START
        self._scanner = ValueScanner("{")
        self._buffer: list[str] = []
        self._key: Any = None
        self._name: str | None = None
        self._held: str | None = None  # arguments that came before the name
        self._streamed = False

    @property
    def raw(self) -> str:
        return "".join(self._raw)

    def push(self, text: str) -> tuple[list[Event], str]:
        """The events of as much of ``text`` as belongs to the object, and the rest."""
        events: list[Event] = []
        for position, char in enumerate(text):
            if self.done or self.failed:
                return events, text[position:]
            if not self.started:
                self._raw.append(char)
            self._step(char, events)
        return events, ""

    def _step(self, char: str, events: list[Event]) -> None:
        if self._expects is _Expects.INSIDE:
            taken = self._scanner.take(char)
            if taken:
                self._take(char, events)
            if self._scanner.done:
                self._end_value(events)
            if taken:
                return
        if char in SPACE:
            return
        match self._expects, char:
            case _Expects.START, "{":
                self._expects = _Expects.KEY
            case _Expects.KEY, '"':
                self._key = None
                self._begin(char, events)
            case _Expects.COLON, ":":
                self._expects = _Expects.VALUE
            case _Expects.VALUE, _:
                self._begin(char, events)
            case _Expects.NEXT, ",":
                self._expects = _Expects.KEY
            case ((_Expects.NEXT | _Expects.KEY), "}"):
                self._end(events)
            case _:
                self.failed = True

    def _begin(self, char: str, events: list[Event]) -> None:
        self._scanner, self._expects, self._buffer = ValueScanner(char), _Expects.INSIDE, []
        self._streamed = char == "{" and self._key in ARGUMENT_KEYS and not self.started
        if self._streamed:
            if self._name is None:
                self._held = ""
            else:
                self._start(events)
        self._take(char, events)

    def _take(self, char: str, events: list[Event]) -> None:
        if self._streamed and self._held is None:
            events.append(Argued(char))
        elif self._streamed:
            self._held = (self._held or "") + char
        else:
            self._buffer.append(char)

    def _end_value(self, events: list[Event]) -> None:
        if self._key is None:
            self._key = self._decoded()
            self._expects = _Expects.COLON
            return
        self._expects = _Expects.NEXT
        if self._key == "name":
            name = self._decoded()
            self._name = name if isinstance(name, str) and name else None
            self.failed = self._name is None
            if self._held is not None and not self.failed:
                self._start(events)
        elif self._key in ARGUMENT_KEYS and not self._streamed and not self.started:
            self._end_odd_arguments(events)

    def _end_odd_arguments(self, events: list[Event]) -> None:
        """Not an object, but perhaps one as text, or null."""
        value = self._decoded()
        self._held = "{}" if value is None and self._buffer[0] == "n" else value
        if not isinstance(self._held, str):
            self._held, self.failed = None, True
        elif self._name is not None:
            self._start(events)

    def _start(self, events: list[Event]) -> None:
        assert self._name is not None
        self.started = True
        events.append(Called(self._name))
        if self._held:
            events.append(Argued(self._held))
        self._held = None

    def _end(self, events: list[Event]) -> None:
        if not self.started and self._name is not None and not self._needs_arguments:
            self._held = "{}"
            self._start(events)
        self.done, self.failed = self.started, not self.started

    def _decoded(self) -> Any:
        try:
            return json.loads("".join(self._buffer))
        except (ValueError, RecursionError):
            self.failed = True
            return None


def held_back(text: str, marker: str) -> int:
    """Length of the longest end of ``text`` with which ``marker`` begins."""
    longest = min(len(marker) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)
