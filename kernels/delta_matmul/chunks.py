"""The rows of a step as the kernels see them: chunks of at most ``CHUNK_ROWS`` rows of one delta.

C chunks. One table per step serves every layer; work is proportional to rows, and a table that
is padded with idle chunks keeps its shape from step to step, as CUDA graphs need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from deltaserve.kernels.staging import to_device

# Tensor cores take 8 or 16 rows at a time, so fewer would not be cheaper.
CHUNK_ROWS = 16
# From here on a segment reads its delta once, dequantised, through the library's matmul: the
# packed kernels read it once per chunk. An engine measures its own (``crossover.py``).
DENSE_ROWS = 128
# The base's slot, which no delta has: a chunk of it does nothing.
BASE_SLOT = 0


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows ``start .. end`` of the packed step run the delta in ``slot``."""

    slot: int
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class RowChunks:
    """slot_C, start_C, end_C int32 on the device. slots: the deltas that occur among the chunks;
    None: any may, because the tensors will be written anew for a captured step.

    dense: the segments that are too long for chunks, known to the host alone.
    """

    slot_C: torch.Tensor
    start_C: torch.Tensor
    end_C: torch.Tensor
    slots: frozenset[int] | None
    dense: tuple[Segment, ...] = ()

    def touch(self, slots: Iterable[int]) -> bool:
        """Whether a launch for these slots is needed."""
        return self.slots is None or not self.slots.isdisjoint(slots)


def cut(
    segments: Iterable[Segment],
    device: torch.device | str,
    *,
    capacity: int = 0,
    dense_rows: int = DENSE_ROWS,
) -> RowChunks:
    """Chunks of the segments, padded with idle ones to ``capacity``; one copy to the device.
    Segments of ``dense_rows`` and more are left whole."""
    short, dense = [], []
    for segment in segments:
        if segment.end - segment.start >= dense_rows:
            dense.append(segment)
        else:
            short += _chunks_of(segment)
    slots = frozenset(slot for slot, _, _ in short)
    table_3C = to_device(_table(short, max(capacity, len(short))), device)
    return RowChunks(table_3C[0], table_3C[1], table_3C[2], slots, tuple(dense))


def idle_table(segments: Iterable[Segment], capacity: int) -> torch.Tensor:
    """[3, C] int32 on the host: all segments in chunks, to write into those of a captured step."""
    return _table([chunk for segment in segments for chunk in _chunks_of(segment)], capacity)


def _chunks_of(segment: Segment) -> list[tuple[int, int, int]]:
    starts = range(segment.start, segment.end, CHUNK_ROWS)
    return [(segment.slot, start, min(start + CHUNK_ROWS, segment.end)) for start in starts]


def _table(chunks: list[tuple[int, int, int]], capacity: int) -> torch.Tensor:
    padded = chunks + [(BASE_SLOT, 0, 0)] * (capacity - len(chunks))
    return torch.tensor(padded, dtype=torch.int32).view(-1, 3).T.contiguous()
