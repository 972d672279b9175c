"""How much deltas may take, and what has been counted."""

from __future__ import annotations

from dataclasses import dataclass

from deltaserve.engine.versions import DeltaVersion
from deltaserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Limits:
    """Memory in bytes, times in seconds.

    min_residency_s: what was loaded stays so long at least, against thrash; min_attached_s: what
    only had to be attached, because its operands lay in host memory. starvation_s: who waited so
    long goes first. attach_s: what attaching may take of the time between two steps.
    """

    device_bytes: int
    host_bytes: int
    merge_bytes: int = 0
    merge_at_start: bool = False
    min_residency_s: float = 0.25
    min_attached_s: float = 0.1
    starvation_s: float = 1.0
    attach_s: float = 0.002


@dataclass(slots=True)
class Counts:
    """Since the start. hits, misses: requests that found their delta on the device, or not."""

    loads: int = 0
    load_seconds: float = 0.0
    evictions: int = 0
    failures: int = 0
    hits: int = 0
    misses: int = 0


def require_room(
    limit_bytes: int,
    subject: DeltaVersion,
    pinned: set[DeltaVersion],
    others: set[DeltaVersion],
) -> None:
    """Beside all that is pinned, each of the others must fit, or it could never be served.

    Raises ConfigError with the numbers; ``subject`` is what was asked for.
    """
    fixed = sum(version.needs.device_bytes for version in pinned)
    largest = max((version.needs.device_bytes for version in others), default=0)
    if fixed + largest > limit_bytes:
        raise ConfigError(
            f"{subject.name!r} ({subject.needs.device_bytes} bytes) does not fit: "
            f"delta_memory_bytes is {limit_bytes}, but pinned deltas take {fixed} and the "
            f"largest of the others {largest}; raise it, or pin less"
        )
