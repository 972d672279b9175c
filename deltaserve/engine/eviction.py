"""Whose memory is taken first: GreedyDual-Size-Frequency.

Cherkasova, "Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching policy"
(HP Labs, 1998): a version is worth clock + frequency * cost / size, the cheapest goes, and the
clock rises to its worth, so that what was popular once ages. Cost is the seconds that loading it
again would take, size its bytes.
"""

from __future__ import annotations

from deltaserve.engine.versions import DeltaVersion

# Loads that were never measured, seconds per byte: a disk of 500 MB/s.
UNMEASURED = 1 / 500e6


class GreedyDual:
    """Worth of versions in one tier."""

    def __init__(self) -> None:
        self.clock = 0.0

    def touch(self, version: DeltaVersion) -> None:
        """It was used."""
        size = max(version.needs.device_bytes, 1)
        cost = version.load_seconds or size * UNMEASURED
        version.frequency += 1
        version.priority = self.clock + version.frequency * cost / size

    def evicted(self, version: DeltaVersion) -> None:
        self.clock = max(self.clock, version.priority)
        version.frequency = 0
