"""Which rows of a step belong to which delta. Made once per step, read by every layer.

Rows are packed sorted by delta, so that each delta's rows are one slice and no layer
has to gather. Slot 0 is the base.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch

from deltaserve.engine.transfer import Arrival
from deltaserve.kernels.delta_matmul import BASE_SLOT, DENSE_ROWS, RowChunks, Segment, cut

__all__ = ["BASE_SLOT", "Routing", "Segment", "StepContext", "segments"]


@dataclass(frozen=True, eq=False)
class Routing:
    """tokens: segments over the T packed tokens; logits: over the rows whose logits are kept.

    slot_T: the slot of each packed token, on the device. static: the chunks of a captured step,
    whose tensors are written anew before each replay; then the segments are not known here.
    captured: of a captured step, with deltas (``static``) or without. dense_rows: see ``cut``.
    """

    tokens: tuple[Segment, ...]
    logits: tuple[Segment, ...]
    slot_T: torch.Tensor
    static: RowChunks | None = None
    captured: bool = False
    dense_rows: int = DENSE_ROWS

    def has_any(self, slots: Collection[int]) -> bool:
        """Whether a packed token may have one of these slots."""
        if self.static is not None:
            return bool(slots)
        return any(segment.slot in slots for segment in self.tokens)

    @cached_property
    def longest(self) -> int:
        """Packed tokens of the delta that has most of them."""
        return max((segment.end - segment.start for segment in self.tokens), default=0)

    @cached_property
    def token_chunks(self) -> RowChunks:
        """``tokens`` for the kernels: made when the first layer asks, shared by the others."""
        return self.static or cut(self.tokens, self.slot_T.device, dense_rows=self.dense_rows)

    @cached_property
    def logit_chunks(self) -> RowChunks:
        return cut(self.logits, self.slot_T.device, dense_rows=self.dense_rows)


class StepContext:
    """Holds the present step's routing; the one object that all delta-aware layers share.

    eager: slots with operands that no captured step can apply. changes: grows whenever captured
    steps have become wrong, because a table moved or another launch is needed. arriving: slots
    whose operands are not all on the device, and when the last will be. dense_rows: see ``cut``.
    """

    def __init__(self) -> None:
        self.routing: Routing = Routing((), (), torch.empty(0, dtype=torch.long))
        self.eager: set[int] = set()
        self.changes = 0
        self.dense_rows = DENSE_ROWS
        self.arriving: dict[int, Arrival] = {}

    def uncapturable(self, slots: Collection[int]) -> bool:
        """Whether a step with rows of these slots must be launched call by call."""
        for slot in [slot for slot in slots if slot in self.arriving]:
            if self.arriving[slot].query():
                del self.arriving[slot]
        return any(slot in self.eager or slot in self.arriving for slot in slots)


def segments(slots: list[int]) -> tuple[Segment, ...]:
    """Runs of equal slots -> segments, the base's left out: it needs no correction."""
    found, start = [], 0
    for slot, run in groupby(slots):
        end = start + len(list(run))
        if slot != BASE_SLOT:
            found.append(Segment(slot, start, end))
        start = end
    return tuple(found)
