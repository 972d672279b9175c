"""Bit packing: small integer codes to and from bytes, row by row.

Inside a row, value ``i`` occupies bits ``[i*b, (i+1)*b)`` of the row's bit stream,
least significant bit first; rows start on a byte. Eight codes of b bits fill exactly
b bytes for every b, so one word of eight codes serves all widths.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

WIDTHS = (1, 2, 3, 4, 8)
CODES_PER_WORD = 8


def packed_size(count: int, bits: int) -> int:
    """Bytes of one row of ``count`` codes."""
    return -(-count * bits // 8)


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[..., K]`` with values below ``2**bits`` -> uint8 ``[..., ceil(K*bits/8)]``."""
    assert bits in WIDTHS, bits
    assert codes.dtype == torch.uint8
    if bits == 8:
        return codes.clone()
    count = codes.shape[-1]
    words = pad(codes, (0, -count % CODES_PER_WORD)).unflatten(-1, (-1, CODES_PER_WORD))
    # int32 holds 8 codes of up to 4 bits; the sign bit is an ordinary bit here.
    stream = torch.zeros(words.shape[:-1], dtype=torch.int32, device=codes.device)
    for i in range(CODES_PER_WORD):
        stream |= words[..., i].to(torch.int32) << (bits * i)
    out = torch.empty((*stream.shape, bits), dtype=torch.uint8, device=codes.device)
    for j in range(bits):
        out[..., j] = (stream >> (8 * j)) & 255
    return out.flatten(-2)[..., : packed_size(count, bits)].contiguous()


def unpack_bits(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Inverse of ``pack_bits``: uint8 ``[..., ceil(K*bits/8)]`` -> uint8 ``[..., K]``."""
    assert bits in WIDTHS, bits
    assert packed.shape[-1] == packed_size(count, bits)
    if bits == 8:
        return packed.clone()
    groups = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    stream = torch.zeros(groups.shape[:-1], dtype=torch.int32, device=packed.device)
    for j in range(bits):
        stream |= groups[..., j].to(torch.int32) << (8 * j)
    shape = (*stream.shape, CODES_PER_WORD)
    out = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    for i in range(CODES_PER_WORD):
        out[..., i] = (stream >> (bits * i)) & (2**bits - 1)
    return out.flatten(-2)[..., :count].contiguous()
