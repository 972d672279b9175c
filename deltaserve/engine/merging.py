"""Which deltas are kept as base + delta, dense: those that save most time per byte.

A merged delta's rows cost one matmul and no decoding, but its projections take the memory of a
whole model. What a step saves is measured (``probe``) and summed over the steps that happen; the
packed operands stay, so that merging can be undone by changing pointers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from deltaserve.engine.operands import Operands
from deltaserve.engine.probe import Savings
from deltaserve.engine.versions import DeltaVersion

# Seconds between two decisions, and after which what was saved counts half as much: long, or the
# prompts of one moment would pass for traffic that goes on.
WINDOW_S = 0.5
HALF_LIFE_S = 10.0
# Merging must have paid for itself after so many seconds of the same traffic.
HORIZON_S = 20.0
# Who takes another's memory must be better by so much, or both would be merged again and again.
MARGIN = 1.5


@dataclass(slots=True)
class Gain:
    """Of one delta. saved: seconds that merging saved, or would have saved, in this window.
    rate: seconds per second."""

    savings: Savings
    saved: float = 0.0
    rate: float = 0.0


class Merger:
    """Decides, and counts bytes. What it decides is carried out by ``Residency``."""

    def __init__(self, limit_bytes: int, now: float) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.merge_seconds = 0.0
        self._gains: dict[DeltaVersion, Gain] = {}
        self._merged: dict[DeltaVersion, int] = {}
        self.merging: DeltaVersion | None = None
        self._since = now

    def __len__(self) -> int:
        """Merged deltas."""
        return sum(version.merged is not None for version in self._merged)

    def could_hold(self, version: DeltaVersion) -> bool:
        """It has something to merge, and there is memory for it if for nobody else."""
        return 0 < version.needs.merged_bytes <= self.limit_bytes

    def add(self, version: DeltaVersion, savings: Savings) -> None:
        """A delta is on the device."""
        self._gains[version] = Gain(savings)

    def count(self, version: DeltaVersion, rows: int) -> None:
        """A step had so many rows of it."""
        gain = self._gains.get(version)
        if gain is not None:
            gain.saved += gain.savings.of(rows)

    def choose(self, now: float) -> tuple[DeltaVersion | None, list[DeltaVersion]]:
        """Once per window: (whom to merge, whose memory it gets)."""
        elapsed = now - self._since
        if elapsed < WINDOW_S or not self._gains:
            return None, []
        weight = 1 - 0.5 ** (elapsed / HALF_LIFE_S)
        for gain in self._gains.values():
            gain.rate += weight * (gain.saved / elapsed - gain.rate)
            gain.saved = 0.0
        self._since = now
        if self.merging is not None:
            return None, []
        return self._best()

    def first(self, versions: Iterable[DeltaVersion]) -> Iterator[DeltaVersion]:
        """At the start, without any traffic yet: in the order given, as far as memory goes."""
        for version in versions:
            gain = self._gains.get(version)
            fits = version.needs.merged_bytes <= self.limit_bytes - self.used_bytes
            if gain is not None and fits and max(gain.savings.seconds) > 0:
                yield version

    def start(self, version: DeltaVersion) -> None:
        """It is being merged: its memory is taken from here on."""
        self.merging = version
        self._merged[version] = version.needs.merged_bytes
        self.used_bytes += version.needs.merged_bytes

    def done(self, version: DeltaVersion, merged: Operands | None, seconds: float) -> bool:
        """None: it failed, and is not tried again. False if it is not wanted any more.

        seconds: of a processor that it took, which those who decode had to do without.
        """
        self.merging = None
        self.merge_seconds = seconds
        if merged is None:
            self.drop(version)
        elif version in self._merged:
            version.merged = merged
            return True
        return False

    def undo(self, version: DeltaVersion) -> None:
        """Its memory is free; it may be merged again."""
        self.used_bytes -= self._merged.pop(version, 0)
        version.merged = None

    def drop(self, version: DeltaVersion) -> None:
        """It left the device."""
        self.undo(version)
        self._gains.pop(version, None)

    def _best(self) -> tuple[DeltaVersion | None, list[DeltaVersion]]:
        candidates = [v for v in self._gains if v not in self._merged and not v.retired]
        candidates.sort(key=self._density, reverse=True)
        victims = sorted(self._merged, key=self._density)
        for version in candidates:
            if self._gains[version].rate * HORIZON_S <= self.merge_seconds:
                continue
            missing = version.needs.merged_bytes - (self.limit_bytes - self.used_bytes)
            chosen = []
            for victim in victims:
                if missing <= 0 or self._density(victim) * MARGIN > self._density(version):
                    break
                chosen.append(victim)
                missing -= self._merged[victim]
            if missing <= 0:
                return version, chosen
        return None, []

    def _density(self, version: DeltaVersion) -> float:
        gain = self._gains.get(version)
        return gain.rate / version.needs.merged_bytes if gain else 0.0
