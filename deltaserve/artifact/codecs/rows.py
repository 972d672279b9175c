"""``rows``: only the rows that changed. For embeddings, heads and added tokens.

The parameter may have more or fewer rows than the base's: added rows count against
zero, cut rows are simply gone. Row r of the result is the base's row unless listed.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from deltaserve.artifact.codecs.base import (
    Encoded,
    Layout,
    aligned,
    require_finite,
)
from deltaserve.artifact.codecs.int import IntCodec, IntParams
from deltaserve.artifact.codecs.params import at_least, one_of, parse_params
from deltaserve.artifact.packing import WIDTHS
from deltaserve.errors import CodecError

_INT = IntCodec()
BLOCK = 1 << 14
"""Rows that are compared at a time."""
_SIGNED = {2: torch.int16, 4: torch.int32, 8: torch.int64, 1: torch.int8}


@dataclass(frozen=True)
class RowsParams:
    """bits 0: the rows' exact values; else their difference in ``int`` with the other settings.

    rows: how many are stored; written by ``encode``.
    """

    bits: int = 0
    rows: int = 0
    group_size: int = 64
    symmetric: bool = True
    clip: str = "mse"

    def __post_init__(self) -> None:
        one_of("rows", "bits", self.bits, (0, *WIDTHS))
        one_of("rows", "clip", self.clip, ("mse", "absmax"))
        at_least("rows", "group_size", self.group_size, 0)
        at_least("rows", "rows", self.rows, 0)

    @property
    def int_params(self) -> dict[str, Any]:
        grid = IntParams(self.bits, self.group_size, symmetric=self.symmetric, clip=self.clip)
        return asdict(grid)


class RowUpdate(NamedTuple):
    """rows: indices int64 [R], ascending. values [R, ...]: the rows themselves in the parameter's
    dtype, or, if ``additive``, float32 differences to add to the base's rows."""

    rows: torch.Tensor
    values: torch.Tensor
    additive: bool


class RowsCodec:
    """Parts: index int32 [R]; bits 0: values [R, ...]; else codes, scales (zeros) of ``int``."""

    name = "rows"
    additive = False

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        p = parse_params(RowsParams, self.name, params)
        if tensor.dim() == 0:
            raise CodecError("codec rows cannot store a scalar; use raw")
        require_finite(tensor)
        index = changed_rows(tensor, base)
        values = tensor[index]
        exact = p.bits == 0 or values.numel() == 0
        parts = {"index": index.to(torch.int32)}
        if exact:
            stored = {"bits": 0, "rows": len(index)}
            parts["values"] = values
        else:
            stored = asdict(p) | {"rows": len(index)}
            rows = _INT.encode(values, self._base_rows(index, base, values), **p.int_params)
            parts |= rows.tensors
        return Encoded(self.name, stored, tuple(tensor.shape), tensor.dtype, parts)

    def rows(self, enc: Encoded) -> RowUpdate:
        """What changes, for an engine that patches or corrects the base's rows in place."""
        p = parse_params(RowsParams, self.name, enc.params)
        index = enc.tensors["index"].long()
        if p.bits == 0:
            return RowUpdate(index, enc.tensors["values"], False)
        shape = (p.rows, *enc.shape[1:])
        inner = Encoded("int", p.int_params, shape, enc.dtype, enc.tensors)
        return RowUpdate(index, _INT.delta(inner), True)

    def decode(self, enc: Encoded, base: torch.Tensor | None) -> torch.Tensor:
        out = aligned(base, enc.shape, enc.dtype).clone()
        index, values, additive = self.rows(enc)
        if additive:
            rows = self._base_rows(index, base, values)
            out[index] = (rows.float() + values).to(enc.dtype)
        else:
            out[index] = values
        return out

    def resident_bytes(self, enc: Encoded) -> int:
        return enc.num_bytes

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        p = parse_params(RowsParams, self.name, params)
        if not shape or p.rows > shape[0]:
            raise CodecError(f"{p.rows} stored rows do not fit into shape {list(shape)}")
        stored = (p.rows, *shape[1:])
        parts: Layout = {"index": (torch.int32, (p.rows,))}
        if p.bits == 0:
            return parts | {"values": (dtype, stored)}
        return parts | _INT.layout(p.int_params, stored, dtype)

    def check(self, enc: Encoded) -> None:
        p = parse_params(RowsParams, self.name, enc.params)
        index = enc.tensors["index"].long()
        if len(index) and (int(index[0]) < 0 or int(index[-1]) >= enc.shape[0]):
            raise CodecError(f"a row index lies outside 0..{enc.shape[0] - 1}")
        if bool((index.diff() <= 0).any()):
            raise CodecError("row indices are not ascending and unique")
        if p.bits == 0:
            require_finite(enc.tensors["values"])
        else:
            inner = Encoded("int", p.int_params, (p.rows, *enc.shape[1:]), enc.dtype, enc.tensors)
            _INT.check(inner)

    @staticmethod
    def _base_rows(
        index: torch.Tensor, base: torch.Tensor | None, like: torch.Tensor
    ) -> torch.Tensor:
        """The base's rows at ``index``; zero where it has none."""
        if base is None:
            return torch.zeros_like(like)
        rows = torch.zeros(like.shape, dtype=base.dtype)
        known = index < base.shape[0]
        rows[known] = base[index[known]]
        return rows


def changed_rows(tensor: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """Ascending int64 indices of rows whose bits differ from the base's (added: from zero)."""
    if tensor.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    found = []
    for start in range(0, len(tensor), BLOCK):
        some = slice(start, start + BLOCK)
        differs = _differs(tensor[some], None if base is None else base[some])
        found.append(start + differs.flatten(1).any(1).nonzero().flatten())
    return torch.cat(found)


def _differs(tensor: torch.Tensor, base: torch.Tensor | None) -> torch.Tensor:
    """Bits, not values: -0.0 must come back as -0.0. At least two dimensions."""
    reference = aligned(base, tuple(tensor.shape), tensor.dtype)
    signed = _SIGNED[tensor.element_size()]
    differs = tensor.contiguous().view(signed) != reference.contiguous().view(signed)
    return differs if differs.dim() > 1 else differs[:, None]
