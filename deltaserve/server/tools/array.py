"""``[{"name": ..., "parameters": {...}}, ...]``: calls as one JSON array."""

from __future__ import annotations

from deltaserve.server.tools.events import Event
from deltaserve.server.tools.reader import SPACE, CallReader


class CallArray:
    """Reads it. done: to its end. failed: it holds something else."""

    def __init__(self) -> None:
        self.done = self.failed = False
        self.first = True
        """No call was read yet."""
        self._opened = False
        self._between = ""
        self._reader: CallReader | None = None

    @property
    def unread(self) -> str:
        """All that was taken, while no call was read."""
        return self._between + (self._reader.raw if self._reader else "")

    def push(self, text: str) -> tuple[list[Event], str]:
        """Events, and what stands behind the array."""
        events: list[Event] = []
        while text and not (self.done or self.failed):
            if self._reader is None:
                text = self._step(text)
                continue
            found, text = self._reader.push(text)
            events += found
            self.failed = self._reader.failed
            if self._reader.started:
                self.first = False
            if self._reader.done:
                self._reader, self._between = None, ""
        return events, text

    def _step(self, text: str) -> str:
        """A character between two calls -> the rest."""
        char, rest = text[0], text[1:]
        if char == "{" and self._opened:
            self._reader = CallReader()
            return text
        self._between += char
        if char == "[" and not self._opened:
            self._opened = True
        elif char == "]" and self._opened:
            self.done = True
        elif char not in SPACE and not (char == "," and not self.first):
            self.failed = True
        return rest
