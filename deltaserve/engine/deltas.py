"""What the scheduler must know of deltas: is one in memory, and what does a step read of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from deltaserve.engine.sequence import Sequence


class DeltaStore(Protocol):
    """Who keeps deltas in memory. Called between steps, by one thread; must never wait."""

    def acquire(self, seq: Sequence) -> bool:
        """Hold the delta version that ``seq`` was bound to when it came.

        False: it is not in memory yet, and its load has been asked for. The request keeps
        waiting, and nobody behind it is blocked. ``seq.aged`` means that it has waited too
        long already: room must be made, if need be by refusing others. On True ``seq.slot`` is
        set until ``release``, which follows exactly once.
        """
        ...

    def release(self, seq: Sequence) -> None:
        """The request has ended, or gave way and waits again."""
        ...

    def step_bytes(self, slot: int) -> int:
        """Bytes that a step reads because this slot has rows in it, the base's not included."""
        ...


class ResidentDeltas:
    """All deltas are in memory for good; sequences come with their slots."""

    def __init__(self, bytes_of_slot: Mapping[int, int] | None = None) -> None:
        self._bytes_of_slot = bytes_of_slot or {}

    def acquire(self, seq: Sequence) -> bool:
        return True

    def release(self, seq: Sequence) -> None: ...

    def step_bytes(self, slot: int) -> int:
        return self._bytes_of_slot.get(slot, 0)
