"""Many rows of one delta: its weight is unpacked once, and the library multiplies.

The grouped kernels read a delta once for each chunk of rows and keep the tensor cores waiting for
unpacking; from some number of rows on (``crossover.py``), unpacking once into memory costs less. T
rows of the delta, K inputs, N outputs, R rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from deltaserve.kernels.delta_matmul.layout import Operand


def apply_dense(operand: Operand, y_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
    """Turn y, the base's output for many rows of one delta, into the delta's, in place."""
    from deltaserve.kernels.delta_matmul import launch

    kind, parts = operand.kind, operand.parts
    if kind.codec == "lowrank":
        _apply_factors(operand, y_TN, x_TK)
    elif kind.codec == "rows":
        y_TN.index_copy_(1, parts[1].long(), F.linear(x_TK, parts[0]))
    elif kind.indexed:
        dense_NK = launch.dequantised(operand, x_TK.shape[1], x_TK.dtype)
        y_TN.index_add_(1, parts[2].long(), F.linear(x_TK, dense_NK))
    else:
        y_TN.addmm_(x_TK, launch.dequantised(operand, x_TK.shape[1], x_TK.dtype).T)


def _apply_factors(operand: Operand, y_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
    v, u = operand.parts
    h_TR, start = F.linear(x_TK, v), 0
    for part, (rank, outputs) in enumerate(operand.ranks):
        first, end = part * u.shape[1], start + outputs
        h = h_TR[:, first : first + rank]
        y_TN[:, start:end].addmm_(h, u[start:end, :rank].T, alpha=operand.scale)
        start = end
