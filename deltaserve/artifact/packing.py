"""Bit packing: small integer codes to and from bytes, row by row.

Inside a row, value ``i`` occupies bits ``[i*b, (i+1)*b)`` of the row's bit stream,
least significant bit first; rows start on a byte. Eight codes of b bits fill exactly
b bytes for every b, so one word of eight codes serves all widths.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.functional import pad

WIDTHS = (1, 2, 3, 4, 8)
CODES_PER_WORD = 8
# A word as wide as the codes of one byte are once they are unpacked.
_UNPACKED = {1: torch.int64, 2: torch.int32, 4: torch.int16}


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
    if bits in _UNPACKED:
        # A byte at a time: eight times as fast as shifts, and loading a delta is mostly this.
        words = _table(bits, packed.device).index_select(0, packed.flatten().int())
        codes = words.view(torch.uint8).view(*packed.shape[:-1], packed.shape[-1] * (8 // bits))
    else:
        codes = _shifted(packed, bits).flatten(-2)
    return codes[..., :count].contiguous()


def _shifted(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 ``[..., n]`` -> uint8 ``[..., ceil(n/bits), 8]``, where codes cross bytes as well."""
    groups = pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
    stream = torch.zeros(groups.shape[:-1], dtype=torch.int32, device=packed.device)
    for j in range(bits):
        stream |= groups[..., j].to(torch.int32) << (8 * j)
    shape = (*stream.shape, CODES_PER_WORD)
    out = torch.empty(shape, dtype=torch.uint8, device=packed.device)
    for i in range(CODES_PER_WORD):
        out[..., i] = (stream >> (bits * i)) & (2**bits - 1)
    return out


@cache
def _table(bits: int, device: torch.device) -> torch.Tensor:
    """[256]: the codes of every byte, as one word each."""
    every = torch.arange(256, dtype=torch.uint8, device=device)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=device)
    codes: torch.Tensor = (every[:, None] >> shifts) & (2**bits - 1)
    return codes.view(_UNPACKED[bits]).flatten()
