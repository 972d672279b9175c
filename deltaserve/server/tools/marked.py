"""Text with calls behind a marker: what Hermes' and Mistral's formats have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from deltaserve.server.tools.events import Called, Event, Said, join
from deltaserve.server.tools.reader import held_back


class MarkedCalls(ABC):
    """A ToolParser. White space next to calls belongs to them, and is not said."""

    marker: ClassVar[str]
    markers: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        self._text = ""  # outside of calls, not yet said
        self._gap = ""  # white space before the marker
        self._inside = False
        self._called = False

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            if self._inside:
                found, rest = self._push_call(text)
                events += found
                self._inside = rest is None
                self._called |= any(isinstance(event, Called) for event in found)
                text = rest or ""
            else:
                text = self._push_text(text, events)
        return join(events)

    def finish(self) -> list[Event]:
        events: list[Event] = []
        if self._inside:
            events += self._finish_call()
            self._inside = False
        if self._text.strip() or not self._called:
            self._say(self._text, events)
        self._text = ""
        return join(events)

    @abstractmethod
    def _push_call(self, text: str) -> tuple[list[Event], str | None]:
        """Text behind the marker -> events, and what stands behind the call; None: it goes on."""

    @abstractmethod
    def _finish_call(self) -> list[Event]:
        """The answer ended within a call."""

    def _no_call(self, text: str) -> Said:
        """What stood behind the marker was none."""
        return Said(self._gap + self.marker + text)

    def _push_text(self, text: str, events: list[Event]) -> str:
        """What stands behind the marker, if it is there."""
        self._text += text
        before, marker, behind = self._text.partition(self.marker)
        if marker:
            self._say(before.rstrip(), events)
            self._gap = before[len(before.rstrip()) :]
            self._text, self._inside = "", True
            return behind
        undecided = held_back(self._text, self.marker)
        settled = self._text[: len(self._text) - undecided].rstrip()
        self._say(settled, events)
        self._text = self._text[len(settled) :]
        return ""

    def _say(self, text: str, events: list[Event]) -> None:
        if text:
            events.append(Said(text))
