"""``nm24``: of every 4 neighbours along the input dim the 2 largest, quantised.

The format of DeltaZip (Yao et al., EuroSys 2025); ``compress`` can calibrate what is kept.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from deltaserve.artifact.codecs.base import (
    AdditiveCodec,
    Encoded,
    Layout,
    difference,
    matrix_shape,
    require_finite,
)
from deltaserve.artifact.codecs.params import at_least, one_of, parse_params
from deltaserve.artifact.codecs.quantise import (
    SCALE_DTYPE,
    Grid,
    Plane,
    dequantise_into,
    quantise,
    row_chunks,
)
from deltaserve.artifact.packing import WIDTHS, pack_bits, packed_size, unpack_bits
from deltaserve.errors import CodecError

INDEX_BITS = 2


@dataclass(frozen=True)
class Nm24Params:
    """bits of a kept value; group_size in columns of the parameter (0: whole row); clip."""

    bits: int = 4
    group_size: int = 64
    clip: str = "mse"

    def __post_init__(self) -> None:
        one_of("nm24", "bits", self.bits, WIDTHS)
        one_of("nm24", "clip", self.clip, ("mse", "absmax"))
        at_least("nm24", "group_size", self.group_size, 0)
        if self.group_size % 4:
            raise CodecError(f"codec nm24: group_size must be a multiple of 4: {self.group_size}")

    @property
    def grid(self) -> Grid:
        """Over kept values: half of a group's columns."""
        return Grid(self.bits, self.group_size // 2, "group", True, self.clip)


def kept_columns(columns: int) -> int:
    """Stored values per row: 2 of each 4, with K padded to a multiple of 4."""
    return -(-columns // 4) * 2


class Nm24Codec(AdditiveCodec):
    """Parts, for a parameter seen as [N, K] with K2 = kept_columns(K):

    codes uint8 [N, ceil(K2*bits/8)]; index uint8 [N, ceil(K2*2/8)], 2 bits per value, its
    place among its 4, ascending; scales bf16 [N, ceil(K/group_size)]. Values are mid-rise.
    """

    name = "nm24"

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        p = parse_params(Nm24Params, self.name, params)
        rows, columns = matrix_shape(tuple(tensor.shape))
        kept, index = _keep_two(difference(tensor, base).view(rows, columns))
        # K = 4m + 1 leaves a padding column among the kept: it must not bias the scale.
        real = kept[:, : kept.shape[1] - (columns % 4 == 1)].contiguous()
        plane = quantise(real, p.grid)
        codes = pad(plane.codes, (0, kept.shape[1] - real.shape[1]))
        whole = Plane(codes, plane.scales, None)
        return self._pack(whole, index, p, tuple(tensor.shape), tensor.dtype)

    def from_codes(
        self,
        plane: Plane,
        kept_NK: torch.Tensor,
        params: Nm24Params,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Encoded:
        """Codes [N, K] and a mask of exactly 2 in each 4 columns that somebody else chose."""
        rows, columns = kept_NK.shape
        assert columns % 4 == 0
        place = kept_NK.view(rows, -1, 4).to(torch.uint8).topk(2, dim=2).indices.sort(dim=2).values
        codes = plane.codes.view(rows, -1, 4).gather(2, place).flatten(1)
        chosen = Plane(codes, plane.scales, None)
        return self._pack(chosen, place.flatten(1).to(torch.uint8), params, shape, dtype)

    def _pack(
        self,
        plane: Plane,
        index: torch.Tensor,
        p: Nm24Params,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Encoded:
        tensors = {
            "codes": pack_bits(plane.codes, p.bits),
            "index": pack_bits(index, INDEX_BITS),
            "scales": plane.scales,
        }
        return Encoded(self.name, asdict(p), shape, dtype, tensors)

    def delta(self, enc: Encoded) -> torch.Tensor:
        p = parse_params(Nm24Params, self.name, enc.params)
        rows, columns = matrix_shape(enc.shape)
        count = kept_columns(columns)
        plane = Plane(unpack_bits(enc.tensors["codes"], p.bits, count), enc.tensors["scales"], None)
        device = enc.tensors["codes"].device
        values = torch.zeros(rows, count, device=device)
        dequantise_into(values, plane, p.grid)
        index = unpack_bits(enc.tensors["index"], INDEX_BITS, count)
        out = torch.zeros(rows, count * 2, device=device)
        for some in row_chunks(rows, count):
            fours = out[some].view(-1, count // 2, 4)
            place = index[some].long().view(-1, count // 2, 2)
            fours.scatter_(2, place, values[some].view(-1, count // 2, 2))
        return out[:, :columns].reshape(enc.shape)

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        p = parse_params(Nm24Params, self.name, params)
        rows, columns = matrix_shape(shape)
        count = kept_columns(columns)
        groups = 1 if p.group_size == 0 else -(-columns // p.group_size)
        return {
            "codes": (torch.uint8, (rows, packed_size(count, p.bits))),
            "index": (torch.uint8, (rows, packed_size(count, INDEX_BITS))),
            "scales": (SCALE_DTYPE, (rows, groups)),
        }

    def check(self, enc: Encoded) -> None:
        require_finite(enc.tensors["scales"])
        rows, columns = matrix_shape(enc.shape)
        index = unpack_bits(enc.tensors["index"], INDEX_BITS, kept_columns(columns))
        pairs = index.view(rows, -1, 2)
        if bool((pairs[..., 0] >= pairs[..., 1]).any()):
            raise CodecError("two kept values share a place, or their places do not ascend")


def _keep_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 2 largest of each 4 columns of x [N, K]: values [N, K2], places uint8 [N, K2]."""
    rows, columns = x.shape
    count = kept_columns(columns)
    kept = torch.empty(rows, count)
    index = torch.empty(rows, count, dtype=torch.uint8)
    for some in row_chunks(rows, columns):
        # Padding counts as less than zero, so real columns are preferred to it.
        size = pad(x[some].abs(), (0, count * 2 - columns), value=-1.0).view(-1, count // 2, 4)
        place = size.topk(2, dim=2).indices.sort(dim=2).values
        fours = pad(x[some], (0, count * 2 - columns)).view(-1, count // 2, 4)
        kept[some] = fours.gather(2, place).flatten(1)
        index[some] = place.flatten(1).to(torch.uint8)
    return kept, index
