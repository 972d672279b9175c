"""Delta matmul of ``int`` up to 4 bits on a CPU, by torch's own 4-bit matmul.

T rows, K inputs, N outputs, G groups per row. The operator multiplies by
``(code - 8) * scale + zero`` with codes of 4 bits. The codecs' symmetric levels,
``(q - (2^b - 1) / 2) * s``, are the same numbers as ``(2q - (2^b - 1)) * (s / 2)``: up to 3 bits
these odd integers fit between -8 and 7, and with 4 bits a zero of ``s / 2`` does it, so nothing
is rounded. It reads the weights at 4 bits and does not unpack them into memory.

The operator is fast in bfloat16 only: for a 1536 x 512 matrix on one core with AVX2 it took 1.9 ms
for one row and 29 ms for 16 in float32, 0.17 and 0.67 in bfloat16 (the table of ``cpu``: 1.8 and
2.3). So it multiplies in bfloat16 whatever the activations are; see ``loses_nothing``.

It unpacks the weights anew for every few rows. Two cores with AVX512-BF16 took 0.04, 0.29, 0.59
and 2.3 ms for 4, 32, 64 and 256 rows of that matrix, where oneDNN takes 0.24 and 0.9 ms for the
last two. Many rows are therefore multiplied by base + difference: ``add_to`` takes 0.4 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch

from deltaserve.artifact.codecs.base import Encoded, matrix_shape
from deltaserve.artifact.packing import unpack_bits

CODEC = "int4"
"""Of operands in this layout; it is not a codec of artifacts."""
GROUP_SIZES = (256, 128, 64, 32)
ROW_MULTIPLE = 16
BLOCK_ROWS = 256
"""Converted at a time, so that loading threads can rest: a multiple of the operator's own blocks
of rows, which are stored one after the other."""
COMPUTED_IN = torch.bfloat16
UNPACKED = 1 << 20
"""Weights that are unpacked at a time: few enough for the processor's cache."""
_INNER_TILES = 1  # the CPU operator knows one layout only
_multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default


class Stored(Protocol):
    """A stored parameter, or what a manifest says of it."""

    @property
    def codec(self) -> str: ...
    @property
    def params(self) -> dict[str, Any]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def supports(enc: Stored) -> bool:
    """Symmetric, 1 to 4 bits, scales per group, row or tensor, in shapes the operator takes."""
    if enc.codec != "int" or not enc.params["symmetric"] or enc.params["bits"] > 4:
        return False
    rows, _ = matrix_shape(enc.shape)
    return rows % ROW_MULTIPLE == 0 and _group_size([enc]) is not None


def loses_nothing(stored: torch.dtype, activations: torch.dtype) -> bool:
    """Whether a fine-tune may be multiplied in bfloat16: one that is stored in 16 bits was made
    with such products. One in float32 only where the activations are bfloat16 anyway."""
    return stored != torch.float32 or activations == torch.bfloat16


def fusable(encs: Sequence[Stored]) -> bool:
    """Whether operands that share their input can be one, their outputs side by side."""
    return (
        all(supports(enc) for enc in encs)
        and len({enc.params["planes"] for enc in encs}) == 1
        and _group_size(encs) is not None
    )


def pack(encs: Sequence[Encoded], rest: Callable[[], None] = lambda: None) -> list[Encoded]:
    """``int`` matrices that share their K inputs as one; by plane.

    rest: called between slices of the work. packed uint8 [N, K / 2] in the operator's own order;
    scales bfloat16 [G, N, 2]: scale and zero, which is half a scale or nothing.
    """
    size = _group_size(encs)
    assert size is not None, "ask supports or fusable first"
    shape = (sum(matrix_shape(enc.shape)[0] for enc in encs), matrix_shape(encs[0].shape)[1])
    planes = []
    for plane in range(encs[0].params["planes"]):
        blocks = []
        for start in range(0, shape[0], BLOCK_ROWS):
            codes = _codes(encs, plane, start, start + BLOCK_ROWS)
            convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
            blocks.append(convert(codes, _INNER_TILES))
            rest()
        tensors = {
            "packed": torch.cat(blocks),
            "scales": torch.cat([_scales(enc, plane, size) for enc in encs], dim=1),
        }
        planes.append(Encoded(CODEC, {"group_size": size}, shape, COMPUTED_IN, tensors))
    return planes


def packed_bytes(encs: Sequence[Stored]) -> int:
    """Size of what ``pack`` makes."""
    size = _group_size(encs)
    assert size is not None, "ask supports or fusable first"
    rows = sum(matrix_shape(enc.shape)[0] for enc in encs)
    columns = matrix_shape(encs[0].shape)[1]
    scales = 2 * rows * (columns // size) * COMPUTED_IN.itemsize
    return int(encs[0].params["planes"]) * (rows * columns // 2 + scales)


def delta_matmul(y_TN: torch.Tensor, x_TK: torch.Tensor, enc: Encoded) -> None:
    """Add ``x @ delta^T`` to y in place."""
    tensors = enc.tensors
    if x_TK.dtype != COMPUTED_IN:
        x_TK = x_TK.to(COMPUTED_IN)
    y_TN.add_(_multiply(x_TK, tensors["packed"], enc.params["group_size"], tensors["scales"]))


def dense_rows(dtype: torch.dtype) -> int:
    """From so many rows on ``add_to`` and one plain matmul are faster than the operator beside
    the base's, by the weight's dtype. In float32, whose matmuls are slower, 256 of them took 5.4
    and 5.7 ms with AVX2 (1536 x 512, two cores), 128 took 4.3 and 2.8."""
    return 64 if dtype == torch.bfloat16 else 256


def unpacks(enc: Encoded) -> bool:
    """Whether ``add_to`` can read an operand, in the order that this processor's operator wants."""
    block = _outputs_per_block()
    return enc.codec == CODEC and block > 0 and enc.shape[0] % block == 0


def add_to(weight_NK: torch.Tensor, enc: Encoded) -> None:
    """Add the difference to a plain weight in place, rounding the sum once."""
    block, size, (outputs, inputs) = _outputs_per_block(), enc.params["group_size"], enc.shape
    packed = enc.tensors["packed"].view(outputs // block, inputs, block // 2)
    scale_NG1, zero_NG1 = enc.tensors["scales"].to(weight_NK.dtype).transpose(0, 1).split(1, -1)
    halves_NG1 = (zero_NG1 != 0).to(weight_NK.dtype) / 2
    odd = bool(halves_NG1.any())
    grouped_NGS = weight_NK.view(outputs, inputs // size, size)
    step = max(1, UNPACKED // (block * inputs))
    for first in range(0, len(packed), step):
        rows = slice(first * block, (first + step) * block)
        codes = packed[first : first + step].transpose(1, 2).contiguous()
        codes = torch.stack([codes & 15, codes >> 4], dim=1).view(torch.int8).sub_(8)
        levels_NGS = codes.to(weight_NK.dtype).view(-1, inputs // size, size)
        if odd:
            levels_NGS += halves_NG1[rows]
        grouped_NGS[rows].addcmul_(levels_NGS, scale_NG1[rows])


@cache
def _outputs_per_block() -> int:
    """The operator's own order differs between processors. Where it stores blocks of so many
    outputs, for each input the first half of them in the low bits and the second in the high ones;
    0: it is another one."""
    codes = (
        torch.arange(64 * 64, dtype=torch.int32).view(64, 64).mul_(2654435).bitwise_right_shift_(7)
    )
    codes.bitwise_and_(15)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, _INNER_TILES)
    for block in (64, 32):
        halves = packed.view(64 // block, 64, block // 2).transpose(1, 2)
        if torch.equal(torch.cat([halves & 15, halves >> 4], dim=1).view(64, 64).int(), codes):
            return block
    return 0


def _group_size(encs: Sequence[Stored]) -> int | None:
    """The largest group that the operator takes and that no scale of any matrix crosses."""
    sizes = [_columns_per_scale(enc) for enc in encs]
    if None in sizes:
        return None
    common = math.gcd(*(size for size in sizes if size is not None))
    return next((size for size in GROUP_SIZES if common % size == 0), None)


def _columns_per_scale(enc: Stored) -> int | None:
    """Neighbouring columns of a row that share a scale; None if rows share it by column."""
    columns = matrix_shape(enc.shape)[1]
    if enc.params["scale_axis"] == "column":
        return None
    size = enc.params["group_size"] if enc.params["scale_axis"] == "group" else 0
    return columns if size == 0 else math.gcd(size, columns)


def _codes(encs: Sequence[Encoded], plane: int, start: int, stop: int) -> torch.Tensor:
    """int32 [stop - start, K], 0 .. 15: rows of all of them below each other."""
    levels = []
    for enc in encs:
        bits, (rows, columns) = enc.params["bits"], matrix_shape(enc.shape)
        if start < rows and stop > 0:
            own = enc.tensors["codes"][plane][max(start, 0) : stop]
            codes = unpack_bits(own, bits, columns)
            levels.append(codes if bits == 4 else codes.mul_(2).add_(9 - 2**bits))
        start, stop = start - rows, stop - rows
    return (torch.cat(levels) if len(levels) > 1 else levels[0]).int()


def _scales(enc: Encoded, plane: int, size: int) -> torch.Tensor:
    """[G, N, 2]: scale and zero of each group of ``size`` columns."""
    rows, columns = matrix_shape(enc.shape)
    stored = enc.tensors["scales"][plane].to(COMPUTED_IN)
    starts = torch.arange(0, columns, size)
    per_scale = enc.params["group_size"] if enc.params["scale_axis"] == "group" else 0
    scales = stored[:, starts // (per_scale or columns)].expand(rows, -1)
    if enc.params["bits"] == 4:
        pair = (scales, scales / 2)
    else:
        pair = (scales / 2, torch.zeros_like(scales))
    return torch.stack(pair, dim=-1).transpose(0, 1).contiguous()
