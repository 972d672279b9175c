"""``{"name": ..., "parameters": {...}}`` as the whole answer, or several with ``;``: Llama 3."""

from __future__ import annotations

from typing import ClassVar

from deltaserve.server.tools.events import Event, Said, join
from deltaserve.server.tools.reader import CallReader

TAG = "<|python_tag|>"


class LlamaParser:
    markers: ClassVar[tuple[str, ...]] = (TAG,)

    def __init__(self) -> None:
        self._waiting = ""  # before it is clear whether a call begins
        self._reader: CallReader | None = None
        self._plain = False  # all that follows is text
        self._called = False

    def push(self, text: str) -> list[Event]:
        events: list[Event] = []
        while text:
            if self._plain:
                events.append(Said(text))
                break
            if self._reader is None:
                text = self._begin(text, events)
                continue
            found, text = self._reader.push(text)
            events += found
            if self._reader.failed:
                events += self.finish()
                self._plain = True
            elif self._reader.done:
                self._reader, self._waiting, self._called = None, "", True
        return join(events)

    def finish(self) -> list[Event]:
        waiting, self._waiting = self._waiting, ""
        reader, self._reader = self._reader, None
        if reader is not None:
            return [] if reader.started else [Said(waiting + reader.raw)]
        return [Said(waiting)] if waiting.strip() or (waiting and not self._called) else []

    def _begin(self, text: str, events: list[Event]) -> str:
        """What is left once a call begins, or it is clear that none does."""
        self._waiting += text
        head = self._waiting.lstrip()
        if self._called:
            head = head.removeprefix(";").lstrip()
        head = head.removeprefix(TAG).lstrip()
        if head.startswith("{"):
            self._waiting = self._waiting[: -len(head)]
            self._reader = CallReader(needs_arguments=True)
            return head
        if not TAG.startswith(head):  # also of nothing
            self._plain = True
            events += self.finish()
        return ""
