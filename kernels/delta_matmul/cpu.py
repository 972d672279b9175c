"""Delta matmul of ``int`` on a CPU: one table look-up per packed byte.

T rows, K inputs, N outputs. The reference unpacks codes, subtracts the middle and multiplies,
each a pass over float32. Here a table of 256 entries turns a byte into its 8 / bits centred
codes in the dtype of the activations, and one multiplication per plane applies the scales.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F

from deltaserve.artifact.codecs.base import Encoded, matrix_shape
from deltaserve.kernels import dense


def supports(enc: Encoded) -> bool:
    """Symmetric 1, 2 or 4 bits whose rows fill whole bytes and whose groups fill whole rows."""
    if enc.codec != "int" or not enc.params["symmetric"] or enc.params["bits"] not in (1, 2, 4):
        return False
    _, columns = matrix_shape(enc.shape)
    group_size = enc.params["group_size"] if enc.params["scale_axis"] == "group" else 0
    # Not by the number of groups: 20 columns in groups of 16 are 16 and 4, not twice 10.
    return columns % (8 // enc.params["bits"]) == 0 and columns % (group_size or columns) == 0


def delta_matmul(y_TN: torch.Tensor, x_TK: torch.Tensor, enc: Encoded) -> None:
    """Add ``x @ delta^T`` to y in place."""
    y_TN.add_(dense.linear(x_TK, dequantise(enc, x_TK.dtype)))


def dequantise(enc: Encoded, dtype: torch.dtype) -> torch.Tensor:
    """The difference [N, K] in ``dtype``, each plane rounded to it once."""
    rows, columns = matrix_shape(enc.shape)
    codes, scales = enc.tensors["codes"], enc.tensors["scales"]
    table = _centred_codes(enc.params["bits"], dtype)
    num_groups = scales.shape[-1]
    total: torch.Tensor | None = None
    for plane in range(len(codes)):
        values = F.embedding(codes[plane].int(), table).view(rows, num_groups, -1)
        # In place: for [N, K] in the cache's size the memory traffic is the whole cost.
        values *= scales[plane].to(dtype)[..., None]
        total = values if total is None else total.add_(values)
    assert total is not None
    return total.view(rows, columns)


@cache
def _centred_codes(bits: int, dtype: torch.dtype) -> torch.Tensor:
    """[256, 8 / bits]: byte -> its codes, lowest bits first, minus the middle of their range."""
    top = 2**bits - 1
    shifts = torch.arange(0, 8, bits)
    codes = (torch.arange(256)[:, None] >> shifts) & top
    return (codes - top / 2).to(dtype)
