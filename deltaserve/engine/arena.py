"""The device memory of all deltas: one piece, reserved at the start, cut into extents.

Nothing is allocated from the driver while requests run, and an operand's address never changes
while it is attached, as captured steps need it. Kernels find operands by absolute addresses in
their tables, so any mix of codecs and sizes fits, and a delta need not lie in one piece.
"""

from __future__ import annotations

import bisect
import logging
import threading

import torch

from deltaserve.errors import ConfigError

logger = logging.getLogger(__name__)

ALIGNMENT = 256
"""Bytes. Loads of the kernels are vectorised only where operands are aligned."""
SLACK = 64
"""A share, 1 / SLACK, that is reserved beyond the budget of deltas: for gaps between extents."""


class Arena:
    """First fit, with neighbouring gaps joined. Thread-safe."""

    def __init__(self, num_bytes: int, device: torch.device | str) -> None:
        """Raises torch.OutOfMemoryError."""
        size = _aligned(num_bytes)
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        self._gaps = [(0, size)] if size else []
        self._lock = threading.Lock()
        self._warned = False

    @property
    def num_free(self) -> int:
        """Bytes in all gaps."""
        with self._lock:
            return sum(end - start for start, end in self._gaps)

    def empty_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Memory for a contiguous tensor of the same shape and dtype.

        From torch's allocator, with one warning, where no gap is large enough.
        """
        start = self._take(_aligned(tensor.nbytes))
        if start is None:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "the deltas' memory has no gap of %d bytes, %d are free in all: allocated "
                    "beside it, and so are others like it",
                    tensor.nbytes,
                    self.num_free,
                )
            return torch.empty_like(tensor, device=self.memory.device)
        whole = self.memory[start : start + tensor.nbytes]
        return whole.view(tensor.dtype).view(tensor.shape)

    def give_back(self, tensor: torch.Tensor) -> None:
        """The memory of a tensor that ``empty_like`` made; of others nothing happens."""
        start = tensor.data_ptr() - self.memory.data_ptr()
        size = _aligned(tensor.nbytes)
        if size == 0 or not 0 <= start < len(self.memory):
            return
        with self._lock:
            end = start + size
            place = bisect.bisect(self._gaps, (start, end))
            before = self._gaps[place - 1][1] if place > 0 else 0
            after = self._gaps[place][0] if place < len(self._gaps) else len(self.memory)
            assert before <= start, "an extent was given back twice"
            assert end <= after, "an extent was given back twice"
            first, last = place, place
            if place > 0 and before == start:
                first, start = place - 1, self._gaps[place - 1][0]
            if place < len(self._gaps) and after == end:
                last, end = place + 1, self._gaps[place][1]
            self._gaps[first:last] = [(start, end)]

    def _take(self, size: int) -> int | None:
        if size == 0:
            return None
        with self._lock:
            for i, (start, end) in enumerate(self._gaps):
                if end - start >= size:
                    self._gaps[i : i + 1] = [(start + size, end)] if end - start > size else []
                    return start
        return None


def reserve(num_bytes: int, device: str) -> Arena | None:
    """For deltas of so many bytes; None on a CPU, whose memory nobody needs to reserve.

    Raises ConfigError.
    """
    if device != "cuda":
        return None
    try:
        return Arena(num_bytes + num_bytes // SLACK, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{num_bytes} bytes for deltas cannot be reserved on the device: lower "
            f"delta_memory_bytes or kv_cache_memory_bytes ({error})"
        ) from error


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
