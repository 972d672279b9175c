"""From the base's output of a projection to a fine-tune's."""

from deltaserve.kernels.delta_matmul.dispatch import delta_matmul

__all__ = ["delta_matmul"]
