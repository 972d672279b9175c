"""``int``: the difference in 1, 2, 3, 4 or 8 bits per value, in groups with bf16 scales.

One plane of 1 bit with one scale per tensor is BitDelta (Liu et al., NeurIPS 2024);
further planes quantise what the earlier ones left over.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
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
from deltaserve.artifact.codecs.params import at_least, one_of, parse_params
from deltaserve.artifact.codecs.quantise import (
    SCALE_DTYPE,
    Grid,
    Plane,
    dequantise_into,
    quantise,
)
from deltaserve.artifact.packing import WIDTHS, pack_bits, packed_size, unpack_bits
from deltaserve.errors import CodecError

MAX_PLANES = 8


@dataclass(frozen=True)
class IntParams:
    """bits 1|2|3|4|8; group_size along the input dim (0: whole row), only for scale_axis group.

    scale_axis group|row|column|tensor; planes: successive residuals; clip absmax|mse.
    """

    bits: int = 2
    group_size: int = 64
    scale_axis: str = "group"
    symmetric: bool = True
    planes: int = 1
    clip: str = "mse"

    def __post_init__(self) -> None:
        one_of("int", "bits", self.bits, WIDTHS)
        one_of("int", "scale_axis", self.scale_axis, ("group", "row", "column", "tensor"))
        one_of("int", "clip", self.clip, ("mse", "absmax"))
        one_of("int", "planes", self.planes, tuple(range(1, MAX_PLANES + 1)))
        at_least("int", "group_size", self.group_size, 0)

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group_size, self.scale_axis, self.symmetric, self.clip)


class IntCodec(AdditiveCodec):
    """Parts, with the parameter seen as [N, K] and P planes:

    codes uint8 [P, N, ceil(K*bits/8)]; scales bf16 [P, N, G] (axis group; row: G = 1),
    [P, 1, K] (column) or [P, 1, 1] (tensor); zeros uint8 like scales if asymmetric.
    """

    name = "int"

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        p = parse_params(IntParams, self.name, params)
        rows, columns = matrix_shape(tuple(tensor.shape))
        residual = difference(tensor, base).view(rows, columns)
        parts: dict[str, list[torch.Tensor]] = {"codes": [], "scales": [], "zeros": []}
        for _ in range(p.planes):
            plane = quantise(residual, p.grid)
            parts["codes"].append(pack_bits(plane.codes, p.bits))
            parts["scales"].append(plane.scales)
            if plane.zeros is not None:
                parts["zeros"].append(plane.zeros)
        tensors = {part: torch.stack(planes) for part, planes in parts.items() if planes}
        return Encoded(self.name, asdict(p), tuple(tensor.shape), tensor.dtype, tensors)

    def from_planes(
        self, planes: list[Plane], params: IntParams, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Encoded:
        """Planes whose codes and scales somebody else chose (symmetric grids only)."""
        assert params.symmetric
        assert params.planes == len(planes)
        tensors = {
            "codes": torch.stack([pack_bits(plane.codes, params.bits) for plane in planes]),
            "scales": torch.stack([plane.scales for plane in planes]),
        }
        return Encoded(self.name, asdict(params), shape, dtype, tensors)

    def delta(self, enc: Encoded) -> torch.Tensor:
        p = parse_params(IntParams, self.name, enc.params)
        rows, columns = matrix_shape(enc.shape)
        out = torch.zeros(rows, columns, device=enc.tensors["codes"].device)
        zeros = enc.tensors.get("zeros")
        for i in range(p.planes):
            plane = Plane(
                unpack_bits(enc.tensors["codes"][i], p.bits, columns),
                enc.tensors["scales"][i],
                None if zeros is None else zeros[i],
            )
            dequantise_into(out, plane, p.grid)
        return out.view(enc.shape)

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        p = parse_params(IntParams, self.name, params)
        rows, columns = matrix_shape(shape)
        scales = (p.planes, *p.grid.scale_shape(rows, columns))
        parts: Layout = {
            "codes": (torch.uint8, (p.planes, rows, packed_size(columns, p.bits))),
            "scales": (SCALE_DTYPE, scales),
        }
        return parts if p.symmetric else parts | {"zeros": (torch.uint8, scales)}

    def check(self, enc: Encoded) -> None:
        require_finite(enc.tensors["scales"])
        zeros = enc.tensors.get("zeros")
        if zeros is not None and int(zeros.max()) > (1 << enc.params["bits"]) - 1:
            raise CodecError("a zero point lies outside the range of the codes")
