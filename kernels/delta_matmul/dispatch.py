"""Which implementation of the delta matmul serves an operand."""

from __future__ import annotations

import torch

from deltaserve.artifact.codecs.base import Encoded
from deltaserve.kernels.delta_matmul import cpu, reference


def delta_matmul(
    y_TN: torch.Tensor, x_TK: torch.Tensor, enc: Encoded, bias_N: torch.Tensor | None = None
) -> None:
    """Turn y, the base's output for x, into the fine-tune's, in place. See ``reference``."""
    if x_TK.device.type == "cpu" and cpu.supports(enc):
        cpu.delta_matmul(y_TN, x_TK, enc)
    else:
        reference.delta_matmul(y_TN, x_TK, enc, bias_N)
