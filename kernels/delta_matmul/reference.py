"""Delta matmul in plain torch, for every codec. T rows, K inputs, N outputs of the fine-tune."""

from __future__ import annotations

from typing import cast

import torch

from deltaserve.artifact.codecs import CODECS
from deltaserve.artifact.codecs.base import AdditiveCodec, Encoded
from deltaserve.artifact.codecs.lowrank import LowRankCodec
from deltaserve.artifact.codecs.rows import RowsCodec
from deltaserve.kernels import dense


def delta_matmul(
    y_TN: torch.Tensor, x_TK: torch.Tensor, enc: Encoded, bias_N: torch.Tensor | None = None
) -> None:
    """Turn y, the base's output for x, into the fine-tune's, in place.

    Codecs of a difference add ``x @ delta^T``; ``raw`` and exact ``rows`` overwrite what
    they store, for which they need the bias that belongs to it.
    """
    if enc.codec == "raw":
        y_TN.copy_(dense.linear(x_TK, enc.tensors["values"], bias_N))
    elif enc.codec == "rows":
        _rows(y_TN, x_TK, enc, bias_N)
    elif enc.codec == "lowrank":
        u_NR, v_RK = cast(LowRankCodec, CODECS["lowrank"]).factors(enc)
        h_TR = dense.linear(x_TK, v_RK.to(x_TK.dtype))
        y_TN.add_(dense.linear(h_TR, u_NR.to(x_TK.dtype)), alpha=enc.params.get("scale", 1.0))
    else:
        codec = cast(AdditiveCodec, CODECS[enc.codec])
        y_TN.add_(dense.linear(x_TK, codec.delta(enc).to(x_TK.dtype)))


def _rows(
    y_TN: torch.Tensor, x_TK: torch.Tensor, enc: Encoded, bias_N: torch.Tensor | None
) -> None:
    index, values, additive = cast(RowsCodec, CODECS["rows"]).rows(enc)
    part = dense.linear(x_TK, values.to(x_TK.dtype))
    if additive:
        y_TN.index_add_(1, index, part)
        return
    if bias_N is not None:
        part += bias_N[index]
    y_TN.index_copy_(1, index, part)
