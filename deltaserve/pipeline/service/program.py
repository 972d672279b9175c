"""What the service runs, as far as it must know: a part on workers, and a part over its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from deltaserve.pipeline.service.feed import Feed
from deltaserve.pipeline.service.ledger import JobSpec
from deltaserve.pipeline.service.rounds import Arrangement, Cost, Rounds

Row = Any


class Elements(Protocol):
    """An iterator whose state says from where to go on."""

    def __iter__(self) -> Elements: ...

    def __next__(self) -> Any: ...

    def get_state(self) -> Any: ...

    def set_state(self, state: Any) -> None: ...


class Program(Protocol):
    """A plan that was cut in two; it can be sent to another process."""

    stream: str
    """A digest of what the elements depend on, seeds included."""
    length: int | None
    """Positions of the source; None: endless."""

    def head(self) -> Callable[[int, int], list[Row]]:
        """The rows of the positions [start, stop), whoever asks, in any order."""

    def elements(self, feed: Feed) -> Elements:
        """The plan's elements, from the rows of a feed."""

    def rows(self, feed: Feed) -> Elements:
        """The elements before they are batched."""

    @property
    def batch(self) -> int:
        """Rows of a batch; 1 if the plan has no batches."""

    def collate(self, rows: list[Row]) -> Any:
        """A batch of ``rows``."""

    def lengths(self, row: Row) -> list[int]:
        """Of the sequences of tokens in a row."""


@dataclass(frozen=True)
class HostedOptions:
    """Of a stream that workers host for several consumers.

    elements, bytes: of the window; in lockstep, how far the fastest consumer may lead. cost,
    look_ahead, seed: of rounds.
    """

    elements: int = 64
    bytes: int = 1 << 30
    cost: Cost = field(default_factory=Cost)
    look_ahead: int = 64
    seed: int = 0

    def text(self) -> str:
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str) -> HostedOptions:
        return msgspec.json.decode(text, type=cls)


def open_elements(program: Program, spec: JobSpec, producer: int, feed: Feed) -> Elements:
    """What a producer of a job makes: the plan's elements, or rounds of them."""
    if spec.mode != "rounds":
        return program.elements(feed)
    options = HostedOptions.parse(spec.options)
    arrangement = Arrangement(spec.consumers, program.batch, options.look_ahead, options.seed)

    def cost(row: Row) -> float:
        return options.cost.of(program.lengths(row))

    return Rounds(program.rows(feed), arrangement, cost, program.collate, producer)
