"""What a parser makes of an answer's text, piece by piece."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Protocol


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call begins; its arguments follow."""

    name: str


@dataclass(frozen=True, slots=True)
class Argued:
    """More of the JSON of the last call's arguments."""

    text: str


Event = Said | Called | Argued


class ToolParser(Protocol):
    """Follows one answer. However its text is cut into pieces, the events together are the same."""

    markers: ClassVar[tuple[str, ...]]
    """Special tokens that must be seen as text."""

    def push(self, text: str) -> list[Event]: ...

    def finish(self) -> list[Event]:
        """What was held back. Text that looked like a call and was none is said as it is."""
        ...


def join(events: list[Event]) -> list[Event]:
    """The same with neighbours of one kind as one."""
    joined: list[Event] = []
    for kind, group in itertools.groupby(events, type):
        found = list(group)
        if kind is Called:
            joined += found
        else:
            text = "".join(event.text for event in found if not isinstance(event, Called))
            joined.append(Said(text) if kind is Said else Argued(text))
    return joined
