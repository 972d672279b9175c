"""Deltas in host memory, so that a load needs no disk: the artifact's bytes, or operands as the
device has them.

On a CPU both are the same memory: while operands are attached, they do not count here.
"""

from __future__ import annotations

from deltaserve.engine.operands import Image
from deltaserve.engine.versions import DeltaVersion


class HostTier:
    """Keeps images within a budget; those of lower priority give way (see ``eviction``)."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self._held: dict[DeltaVersion, int] = {}

    def __len__(self) -> int:
        return len(self._held)

    def start_staging(self, version: DeltaVersion) -> bool:
        """Reserve room for an image that is going to be read; False if there is none."""
        return self._hold(version, version.needs.image_bytes)

    def end_staging(self, version: DeltaVersion) -> None:
        if version.image is None:
            self.drop(version)

    def has_room(self, num_bytes: int) -> bool:
        """Whether an image would stay without others giving way."""
        return self.used_bytes + num_bytes <= self.limit_bytes

    def keep(self, version: DeltaVersion, image: Image) -> None:
        """Keep what was read, if it is worth the room."""
        version.image = image
        self.settle(version)

    def settle(self, version: DeltaVersion) -> None:
        """Count an image anew, after its operands have been attached or detached."""
        if version.image is None:
            return
        size = sum(tensor.nbytes for tensor in version.image.tensors)
        if version.operands is not None:
            size -= version.operands.bytes_shared_with(version.image.tensors)
        if not self._hold(version, size):
            self.drop(version)

    def drop(self, version: DeltaVersion) -> None:
        version.image = None
        self.used_bytes -= self._held.pop(version, 0)

    def _hold(self, version: DeltaVersion, size: int) -> bool:
        self.used_bytes -= self._held.pop(version, 0)
        missing = self.used_bytes + size - self.limit_bytes
        chosen = []
        for other in sorted(self._held, key=lambda v: v.priority):
            if missing <= 0 or other.priority > version.priority:
                break
            if other.image is not None:  # else it is being read
                chosen.append(other)
                missing -= self._held[other]
        if missing > 0:
            return False
        for other in chosen:
            self.drop(other)
        self._held[version] = size
        self.used_bytes += size
        return True
