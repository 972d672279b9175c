"""Dense projections on a CPU, with weights in the order in which oneDNN reads them.

Given a plain weight, each matmul copies it into that order first, which for few rows takes as long
as the product. With a weight of 1536 x 512 on two cores with AVX512-BF16 that of 1, 4, 32
and 256 rows took 139, 155, 257 and 1026 us in bfloat16, and 74, 77, 168 and 943 once it was
packed; 292, 395, 690 and 2977 in float32 (by MKL), and 119, 121, 311 and 1915. In bfloat16 the
results are the same bits.

For each shape of a product oneDNN makes code and buffers, which takes a millisecond and 0.6 MB
(0.7 in float32), and keeps them: 0.7 GB after 300 numbers of rows of one model. So there are few
numbers of rows: see ``padded``. N outputs, K inputs, T rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def has_arithmetic(dtype: torch.dtype) -> bool:
    """Whether the processor's own matmuls take ``dtype``; where they do not, float32 was 4 to 6
    times faster (32 rows of projections of 512 inputs, AVX2)."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True


def packs(weight_NK: torch.Tensor) -> bool:
    """Whether packing makes its products faster here: float32, or what has arithmetic."""
    return (
        weight_NK.device.type == "cpu"
        and not weight_NK.is_mkldnn
        and torch.backends.mkldnn.is_available()
        and weight_NK.dtype in (torch.float32, torch.bfloat16)
        and has_arithmetic(weight_NK.dtype)
    )


def pack(weight_NK: torch.Tensor) -> torch.Tensor:
    """A copy of the same shape and size that only ``linear`` and ``unpack`` can read."""
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach(), None)
    return packed


def unpack(weight_NK: torch.Tensor) -> torch.Tensor:
    """A copy of the weight as it was before ``pack``, bit by bit; also of one that was not."""
    return weight_NK.to_dense() if weight_NK.is_mkldnn else weight_NK.detach().clone()


def padded(rows: int) -> int:
    """The next of the numbers of rows that are computed: all up to 16, then eight to each power
    of two, so that at most an eighth is wasted."""
    step = 1 << max(0, (rows - 1).bit_length() - 4)
    return -(-rows // step) * step


def linear(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None = None
) -> torch.Tensor:
    """``F.linear``, of a packed weight too -> [T, N]."""
    if not _by_onednn(weight_NK):
        return F.linear(x_TK, weight_NK, bias_N)
    rows = len(x_TK)
    more = padded(rows) - rows
    if more:
        x_TK = F.pad(x_TK, (0, 0, 0, more))
    if weight_NK.is_mkldnn:
        y_TN = torch.ops.mkldnn._linear_pointwise(x_TK, weight_NK, bias_N, "none", [], "")
    else:
        y_TN = F.linear(x_TK, weight_NK, bias_N)
    return y_TN[:rows] if more else y_TN


def _by_onednn(weight_NK: torch.Tensor) -> bool:
    """Plain float32 goes to MKL."""
    return weight_NK.is_mkldnn or (
        weight_NK.device.type == "cpu" and weight_NK.dtype in (torch.bfloat16, torch.float16)
    )
