"""``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``: Hermes, Qwen and others."""

from __future__ import annotations

from typing import ClassVar

from deltaserve.server.tools.events import Event
from deltaserve.server.tools.marked import MarkedCalls
from deltaserve.server.tools.reader import CallReader

END = "</tool_call>"


class HermesParser(MarkedCalls):
    marker: ClassVar[str] = "<tool_call>"
    markers: ClassVar[tuple[str, ...]] = (marker, END)

    def __init__(self) -> None:
        super().__init__()
        self._reader = CallReader()
        self._behind = ""  # the call's object, before it is clear what follows

    def _push_call(self, text: str) -> tuple[list[Event], str | None]:
        events, rest = self._reader.push(text)
        if self._reader.failed:
            return [*events, *self._give_up()], rest
        self._behind = (self._behind + rest).lstrip()
        if len(self._behind) < len(END) and END.startswith(self._behind):
            return events, None
        behind, self._behind, self._reader = self._behind, "", CallReader()
        return events, behind.removeprefix(END)

    def _finish_call(self) -> list[Event]:
        return [] if self._reader.done else self._give_up()

    def _give_up(self) -> list[Event]:
        reader, self._reader = self._reader, CallReader()
        return [] if reader.started else [self._no_call(reader.raw)]
