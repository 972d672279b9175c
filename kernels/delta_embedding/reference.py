"""Delta embedding in plain torch, for every codec. T tokens, V rows of the base, D columns."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch

from deltaserve.artifact.codecs import CODECS
from deltaserve.artifact.codecs.base import AdditiveCodec, Encoded
from deltaserve.artifact.codecs.rows import RowsCodec
from deltaserve.kernels.delta_matmul import cpu


def delta_embedding(ids_T: torch.Tensor, base_VD: torch.Tensor, enc: Encoded) -> torch.Tensor:
    """The fine-tune's embeddings of ``ids`` -> [T, D] in the base's dtype.

    Only the rows asked for are decoded. Ids past the base's vocabulary are added tokens,
    whose base counts as zero.
    """
    if enc.codec == "raw":
        return enc.tensors["values"][ids_T]
    base_TD = _base_rows(ids_T, base_VD)
    if enc.codec == "rows":
        return _rows(ids_T, base_TD, enc)
    return (base_TD.float() + _delta_of_rows(enc, ids_T)).to(base_VD.dtype)


def rows_of(ids_T: torch.Tensor, base_VD: torch.Tensor | None, enc: Encoded) -> torch.Tensor:
    """The fine-tune's rows ``ids`` in float32, additive codecs not rounded -> [T, D]."""
    if enc.codec == "raw":
        return enc.tensors["values"][ids_T].float()
    if enc.codec == "xor" or base_VD is None:
        return CODECS[enc.codec].decode(enc, base_VD)[ids_T].float()
    base_TD = _base_rows(ids_T, base_VD)
    if enc.codec == "rows":
        return _rows(ids_T, base_TD.to(enc.dtype), enc).float()
    return _delta_of_rows(enc, ids_T).add_(base_TD.float())


def _base_rows(ids_T: torch.Tensor, base_VD: torch.Tensor) -> torch.Tensor:
    known_T1 = (ids_T < base_VD.shape[0])[:, None]
    return base_VD[ids_T.clamp(max=base_VD.shape[0] - 1)] * known_T1


def _rows(ids_T: torch.Tensor, base_TD: torch.Tensor, enc: Encoded) -> torch.Tensor:
    index = enc.tensors["index"].long()
    if len(index) == 0:
        return base_TD
    place_T = torch.searchsorted(index, ids_T).clamp(max=len(index) - 1)
    stored_T1 = (index[place_T] == ids_T)[:, None]
    # Only what is asked for is decoded: many more rows may be listed.
    parts = {
        name: part[place_T] if name in ("index", "values") else part[:, place_T]
        for name, part in enc.tensors.items()
    }
    cut = replace(enc, params=enc.params | {"rows": len(ids_T)}, tensors=parts)
    _, rows_TD, additive = cast(RowsCodec, CODECS["rows"]).rows(cut)
    if additive:
        rows_TD = base_TD.float() + rows_TD
    return torch.where(stored_T1, rows_TD.to(base_TD.dtype), base_TD)


def _delta_of_rows(enc: Encoded, ids_T: torch.Tensor) -> torch.Tensor:
    """The float32 difference of some rows, cut out of the packed parts where they allow it."""
    codec = cast(AdditiveCodec, CODECS[enc.codec])
    parts = enc.tensors
    if enc.codec == "lowrank" and not enc.params.get("bits"):
        rows = {"u": parts["u"][ids_T], "v": parts["v"]}
    elif enc.codec == "nm24":
        rows = {name: part[ids_T] for name, part in parts.items()}
    elif enc.codec == "int":
        # Parts are [planes, rows, ...]; scales per column or tensor have a single row.
        rows = {name: p if p.shape[1] == 1 else p[:, ids_T] for name, p in parts.items()}
    else:
        return codec.delta(enc)[ids_T]
    cut = replace(enc, tensors=rows, shape=(len(ids_T), *enc.shape[1:]))
    if ids_T.device.type == "cpu" and cpu.supports(cut):
        return cpu.dequantise(cut, torch.float32)  # a tenth of the calls that the codec makes
    return codec.delta(cut)
