"""``nf4``: the difference in 4-bit NormalFloat (QLoRA, Dettmers et al., NeurIPS 2023).

The same codes, nibble order and block maxima as bitsandbytes' quantize_4bit, so that
its kernels can read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from deltaserve.artifact.codecs.base import (
    AdditiveCodec,
    Encoded,
    Layout,
    difference,
    matrix_shape,
    require_finite,
)
from deltaserve.artifact.codecs.params import parse_params

BLOCK = 64
# QLoRA, appendix E.
CODEBOOK = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
CHUNK = BLOCK * (1 << 16)


@dataclass(frozen=True)
class Nf4Params:
    """``nf4`` has no settings: blocks of 64 over the flattened tensor."""


class Nf4Codec(AdditiveCodec):
    """Parts, for n values: codes uint8 [ceil(n/2)], the earlier value in the high nibble;
    absmax float32 [ceil(n/64)]."""

    name = "nf4"

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        parse_params(Nf4Params, self.name, params)
        matrix_shape(tuple(tensor.shape))
        flat = difference(tensor, base).flatten()
        codes, absmax = zip(*(_quantise(chunk) for chunk in flat.split(CHUNK)), strict=True)
        tensors = {"codes": torch.cat(codes), "absmax": torch.cat(absmax)}
        return Encoded(self.name, {}, tuple(tensor.shape), tensor.dtype, tensors)

    def delta(self, enc: Encoded) -> torch.Tensor:
        packed, absmax = enc.tensors["codes"], enc.tensors["absmax"]
        book = torch.tensor(CODEBOOK, device=packed.device)
        rows, columns = matrix_shape(enc.shape)
        out = torch.empty(rows * columns, device=packed.device)
        chunks = zip(
            out.split(CHUNK), packed.split(CHUNK // 2), absmax.split(CHUNK // BLOCK), strict=True
        )
        for values, codes, largest in chunks:
            nibbles = torch.stack((codes >> 4, codes & 15), dim=1).flatten()[: len(values)]
            scale = largest.repeat_interleave(BLOCK)[: len(values)]
            torch.mul(book[nibbles.int()], scale, out=values)
        return out.view(enc.shape)

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        parse_params(Nf4Params, self.name, params)
        rows, columns = matrix_shape(shape)
        count = rows * columns
        return {
            "codes": (torch.uint8, (-(-count // 2),)),
            "absmax": (torch.float32, (-(-count // BLOCK),)),
        }

    def check(self, enc: Encoded) -> None:
        require_finite(enc.tensors["absmax"])


def _quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat float32 -> codes, absmax. Rounds exactly as bitsandbytes does on a CPU."""
    book = torch.tensor(CODEBOOK)
    bounds = (book[:-1] + book[1:]) / 2
    full = len(x) // BLOCK * BLOCK
    blocks = x[:full].view(-1, BLOCK)
    absmax = blocks.abs().amax(1) if full else torch.empty(0)
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).view(-1, 1)).clamp_(-1, 1).flatten()
    if full < len(x):
        # bitsandbytes divides in the short last block and multiplies in the others.
        largest = x[full:].abs().amax().clamp(min=1e-38)
        absmax = torch.cat((absmax, largest.view(1)))
        scaled = torch.cat((scaled, (x[full:] / largest).clamp_(-1, 1)))
    if len(scaled) % 2:
        scaled = torch.cat((scaled, torch.zeros(1)))
    codes = torch.bucketize(scaled, bounds, out_int32=True).to(torch.uint8)
    return (codes[::2] << 4) | codes[1::2], absmax
