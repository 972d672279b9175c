"""From the base's output of a projection to a fine-tune's."""

from deltaserve.kernels.delta_matmul.chunks import BASE_SLOT, RowChunks, Segment, cut
from deltaserve.kernels.delta_matmul.dispatch import delta_matmul
from deltaserve.kernels.delta_matmul.grouped import GroupedDeltas

__all__ = ["BASE_SLOT", "GroupedDeltas", "RowChunks", "Segment", "cut", "delta_matmul"]
