"""How much deltas may take."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory in bytes, times in seconds.

    min_residency_s: what was loaded stays so long at least, against thrash. starvation_s: who
    waited so long goes first. attach_s: what attaching may take of the time between two steps.
    """

    device_bytes: int
    host_bytes: int
    merge_bytes: int = 0
    min_residency_s: float = 0.25
    starvation_s: float = 1.0
    attach_s: float = 0.002
