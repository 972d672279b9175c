"""The device's memory for deltas: slots, bytes, and who must give way."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from itertools import count

from deltaserve.engine.limits import Limits
from deltaserve.engine.operands import Operands
from deltaserve.engine.versions import DeltaVersion, State


class DeviceTier:
    """What is attached to the layers, or about to be.

    used_bytes: reserved from the start of a load to the eviction. by_slot: slot 0 is the base.
    """

    def __init__(self, limits: Limits, base: DeltaVersion) -> None:
        self.limits = limits
        self.used_bytes = 0
        self.by_slot = {0: base}
        self.vocab_sizes = {0: base.needs.vocab_size}
        self._base = base
        self._attaching: deque[tuple[DeltaVersion, Iterator[None]]] = deque()

    def __len__(self) -> int:
        """Deltas in slots."""
        return len(self.by_slot) - 1

    @property
    def free_bytes(self) -> int:
        return self.limits.device_bytes - self.used_bytes

    @property
    def attaching(self) -> bool:
        return bool(self._attaching)

    def reserve(self, version: DeltaVersion, size: int) -> None:
        self.used_bytes += size - version.reserved
        version.reserved = size

    def place(self, version: DeltaVersion, operands: Operands) -> None:
        """Give a loaded version a slot, and its operands to the layers bit by bit."""
        version.operands = operands
        self.reserve(version, operands.num_bytes)
        version.slot = next(slot for slot in count(1) if slot not in self.by_slot)
        self.by_slot[version.slot] = version
        self.vocab_sizes[version.slot] = version.needs.vocab_size
        self.attach_soon(version, operands)

    def attach_soon(self, version: DeltaVersion, operands: Operands) -> None:
        """More operands, or others instead of those it has; it may serve meanwhile."""
        assert version.slot is not None
        self._attaching.append((version, operands.attach(version.slot)))

    def detach_merged(self, version: DeltaVersion) -> None:
        """It goes on packed."""
        assert version.slot is not None
        assert version.merged is not None
        self._attaching = deque(item for item in self._attaching if item[0] is not version)
        version.merged.detach_merged(version.slot)

    def attach(self) -> Iterator[tuple[DeltaVersion, str | None]]:
        """Go on attaching as far as the time between two steps allows -> (version, error)."""
        end = time.perf_counter() + self.limits.attach_s
        while self._attaching and time.perf_counter() < end:
            version, rest = self._attaching[0]
            try:
                if any(time.perf_counter() > end for _ in rest):
                    return
            except Exception as error:  # a delta that no layer takes must not end the engine
                yield version, f"it could not be attached: {type(error).__name__}: {error}"
                continue  # whoever consumed this has made it leave
            self._attaching.popleft()
            yield version, None

    def leave(self, version: DeltaVersion) -> None:
        """Detach, and free slot and bytes."""
        self._attaching = deque(item for item in self._attaching if item[0] is not version)
        if version.slot is not None:
            assert version.operands is not None
            version.operands.detach(version.slot)
            del self.by_slot[version.slot], self.vocab_sizes[version.slot]
        version.slot = version.operands = None
        self.reserve(version, 0)

    def room_for(
        self, version: DeltaVersion, victims: list[DeltaVersion]
    ) -> list[DeltaVersion] | None:
        """The first of ``victims`` whose eviction is enough; None if all of them are not."""
        missing = version.needs.device_bytes - self.free_bytes
        chosen = []
        for victim in victims:
            if missing <= 0:
                break
            chosen.append(victim)
            missing -= victim.reserved
        return chosen if missing <= 0 else None

    def idle(self, now: float) -> list[DeltaVersion]:
        """Whom no running request uses, and who may be evicted."""
        return [version for version in self._settled(now) if version.references == 0]

    def drain_for(self, version: DeltaVersion, now: float) -> None:
        """Let running requests of others end and admit no more of them, longest resident first."""
        settled = sorted(self._settled(now), key=lambda v: v.ready_at)
        leaving = [v for v in settled if v.references == 0 or v.state is State.DRAINING]
        missing = version.needs.device_bytes - self.free_bytes - sum(v.reserved for v in leaving)
        for victim in settled:
            if missing <= 0:
                break
            if victim not in leaving:
                victim.state = State.DRAINING
                missing -= victim.reserved

    def draining(self) -> list[DeltaVersion]:
        return [v for v in self.by_slot.values() if v.state is State.DRAINING]

    def _settled(self, now: float) -> list[DeltaVersion]:
        """Not pinned, and there for long enough to have been of use."""
        return [
            version
            for version in self.by_slot.values()
            if version.attached
            and not version.pinned
            and version is not self._base
            and now - version.ready_at >= self._least_stay(version)
        ]

    def _least_stay(self, version: DeltaVersion) -> float:
        """In seconds: loads that were work must be worth it."""
        limits = self.limits
        return limits.min_residency_s if version.was_prepared else limits.min_attached_s
