"""``sparse``: the difference where it is kept, a bit per value saying where that is.

What dropping leaves, as in DARE (Yu et al., ICML 2024), and updates that touch few values.
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
from deltaserve.artifact.codecs.params import at_least, parse_params
from deltaserve.artifact.packing import pack_bits, packed_size, unpack_bits
from deltaserve.errors import CodecError


@dataclass(frozen=True)
class SparseParams:
    """count: values kept; written by ``encode``."""

    count: int = 0

    def __post_init__(self) -> None:
        at_least("sparse", "count", self.count, 0)


class SparseCodec(AdditiveCodec):
    """Parts, for a parameter seen as [N, K]: mask uint8 [N, ceil(K/8)]; values [count]."""

    name = "sparse"

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        """Every value that differs, in the parameter's dtype."""
        parse_params(SparseParams, self.name, params)
        delta_NK = difference(tensor, base).view(matrix_shape(tuple(tensor.shape)))
        return self.from_values(delta_NK, tuple(tensor.shape), tensor.dtype)

    def from_values(
        self, delta_NK: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Encoded:
        """A difference [N, K] of which most is zero."""
        kept_NK = delta_NK != 0
        values = delta_NK[kept_NK].to(dtype)
        require_finite(values)
        tensors = {"mask": pack_bits(kept_NK.to(torch.uint8), 1), "values": values}
        return Encoded(self.name, {"count": len(values)}, shape, dtype, tensors)

    def delta(self, enc: Encoded) -> torch.Tensor:
        rows, columns = matrix_shape(enc.shape)
        kept = unpack_bits(enc.tensors["mask"], 1, columns).bool()
        out = torch.zeros(rows, columns, device=kept.device)
        out[kept] = enc.tensors["values"].float()
        return out.view(enc.shape)

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        count = parse_params(SparseParams, self.name, params).count
        rows, columns = matrix_shape(shape)
        return {"mask": (torch.uint8, (rows, packed_size(columns, 1))), "values": (dtype, (count,))}

    def check(self, enc: Encoded) -> None:
        require_finite(enc.tensors["values"])
        _, columns = matrix_shape(enc.shape)
        if int(unpack_bits(enc.tensors["mask"], 1, columns).sum()) != enc.params["count"]:
            raise CodecError("the mask keeps another number of values than are stored")
