"""One vector per slot, the base's where a delta has none of its own. S slots, D columns."""

from __future__ import annotations

import torch

TABLE_STEP = 16
"""Rows that a table grows by."""


class SlotTable:
    """Norms and biases: each packed token takes the row of its slot, in one gather.

    The last row is always the base's: higher slots are clamped to it.
    """

    def __init__(self, base_D: torch.Tensor) -> None:
        self.base_D = base_D
        self.rows_SD = base_D[None].clone()
        self.slots: set[int] = set()

    def put(self, slot: int, row_D: torch.Tensor) -> bool:
        """Cheap however many slots there are. True if the table had to move."""
        missing = slot + 2 - len(self.rows_SD)
        if missing > 0:
            more = -(-missing // TABLE_STEP) * TABLE_STEP
            self.rows_SD = torch.cat([self.rows_SD, self.base_D.expand(more, -1)])
        self.rows_SD[slot] = row_D
        first = not self.slots
        self.slots.add(slot)
        return missing > 0 or first

    def drop(self, slot: int) -> None:
        if slot in self.slots:
            self.slots.remove(slot)
            self.rows_SD[slot] = self.base_D

    def of(self, slot_T: torch.Tensor) -> torch.Tensor:
        """[T, D]."""
        return self.rows_SD[slot_T.clamp(max=len(self.rows_SD) - 1)]
