"""The rows of a step as the kernels see them: chunks of at most ``CHUNK_ROWS`` rows of one delta.

C chunks. One table per step serves every layer; work is proportional to rows, and a table that
is padded with idle chunks keeps its shape from step to step, as CUDA graphs need it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# Tensor cores take 8 or 16 rows at a time, so fewer would not be cheaper.
CHUNK_ROWS = 16
# From here on a segment reads its delta once, dequantised, through the library's matmul: the
# packed kernels read it once per chunk.
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
    """slot_C, start_C, end_C int32 on the device. slots: the deltas that occur among the chunks.

    dense: the segments that are too long for chunks, known to the host alone.
    """

    slot_C: torch.Tensor
    start_C: torch.Tensor
    end_C: torch.Tensor
    slots: frozenset[int]
    dense: tuple[Segment, ...]


def cut(segments: Iterable[Segment], device: torch.device | str, *, capacity: int = 0) -> RowChunks:
    """Chunks of the segments, padded with idle ones to ``capacity``; one copy to the device."""
    short, dense = [], []
    for segment in segments:
        if segment.end - segment.start >= DENSE_ROWS:
            dense.append(segment)
            continue
        for start in range(segment.start, segment.end, CHUNK_ROWS):
            short.append((segment.slot, start, min(start + CHUNK_ROWS, segment.end)))
    slots = frozenset(slot for slot, _, _ in short)
    short += [(BASE_SLOT, 0, 0)] * (capacity - len(short))
    table_3C = torch.tensor(short, dtype=torch.int32).view(-1, 3).T.contiguous().to(device)
    return RowChunks(table_3C[0], table_3C[1], table_3C[2], slots, tuple(dense))
