"""From the base's output of a projection to a fine-tune's."""

from deltaserve.kernels.delta_matmul.chunks import (
    BASE_SLOT,
    DENSE_ROWS,
    RowChunks,
    Segment,
    cut,
    idle_table,
)
from deltaserve.kernels.delta_matmul.dispatch import delta_matmul
from deltaserve.kernels.delta_matmul.grouped import GroupedDeltas
from deltaserve.kernels.delta_matmul.layout import Operand as LaidOut
from deltaserve.kernels.delta_matmul.layout import joinable

__all__ = [
    "BASE_SLOT",
    "DENSE_ROWS",
    "GroupedDeltas",
    "LaidOut",
    "RowChunks",
    "Segment",
    "cut",
    "delta_matmul",
    "idle_table",
    "joinable",
]
