"""One parameter in a chosen codec, by the method that belongs to it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch

from deltaserve.artifact.codecs import CODECS, get_codec
from deltaserve.artifact.codecs.base import AdditiveCodec, Encoded, difference, matrix_shape
from deltaserve.artifact.codecs.int import IntParams
from deltaserve.artifact.codecs.lowrank import LowRankParams
from deltaserve.artifact.codecs.nm24 import Nm24Params
from deltaserve.artifact.codecs.sum import SumCodec
from deltaserve.compress.dare import DropParams, encode_dropped
from deltaserve.compress.delta_come import BandParams
from deltaserve.compress.errors import squares
from deltaserve.compress.gptq import Solver, encode_int, encode_nm24
from deltaserve.compress.hessian import Hessian
from deltaserve.compress.plan import CodecChoice
from deltaserve.compress.svd import encode_lowrank

BLOCK = 1 << 12
"""Rows of a table that are encoded at a time. Error feedback holds about eight copies of them."""


def encode(
    choice: CodecChoice,
    tensor: torch.Tensor,
    base: torch.Tensor | None,
    hessian: Hessian | None = None,
    solver: Solver | None = None,
) -> Encoded:
    """``tensor`` in the chosen codec, its codes chosen under the Hessian where they can be."""
    params: Any = dict(choice.params)
    if choice.codec == "sparse":
        return encode_dropped(tensor, base, DropParams(**params))
    if choice.codec == "sum":
        params = {"terms": BandParams(**params).of(tuple(tensor.shape))}
    if hessian is None or not calibratable(choice, tuple(tensor.shape)):
        return get_codec(choice.codec).encode(tensor, base, **params)
    if choice.codec == "nm24":
        return encode_nm24(tensor, base, Nm24Params(**params), hessian, solver)
    if choice.codec == "lowrank":
        return encode_lowrank(tensor, base, LowRankParams(**params), hessian, solver)
    if choice.codec == "sum":
        return _encode_sum(params["terms"], tensor, base, hessian, solver)
    return encode_int(tensor, base, IntParams(**params), hessian, solver)


def stored_apart(choice: CodecChoice) -> bool:
    """Whether each row of a matrix is stored for itself, with nothing in common for all rows."""
    return choice.codec == "rows" or (
        choice.codec == "int" and IntParams(**choice.params).scale_axis in ("group", "row")
    )


def blocks_of(choice: CodecChoice, shape: tuple[int, ...]) -> list[slice]:
    """Rows that are encoded at a time: of tables of many tokens those of a block, where they are
    stored apart; else all of them."""
    if len(shape) != 2 or not stored_apart(choice):
        return [slice(None)]
    return [slice(start, start + BLOCK) for start in range(0, max(shape[0], 1), BLOCK)]


def encode_measured(
    choice: CodecChoice,
    tensor: torch.Tensor,
    base: torch.Tensor | None,
    hessian: Hessian | None = None,
    solver: Solver | None = None,
) -> tuple[Encoded, float]:
    """``encode``, and the relative error; in float32 are only the rows of one block."""
    encs, wrong, size = [], 0.0, 0.0
    for rows in blocks_of(choice, tuple(tensor.shape)):
        some, reference = tensor[rows], None if base is None else base[rows]
        encs.append(encode(choice, some, reference, hessian, solver))
        more_wrong, more_size = squares(encs[-1], some, reference)
        wrong, size = wrong + more_wrong, size + more_size
    enc = encs[0] if len(encs) == 1 else _stacked(encs, tuple(tensor.shape))
    return enc, math.sqrt(wrong) / math.sqrt(size) if size else 0.0


def _stacked(encs: list[Encoded], shape: tuple[int, ...]) -> Encoded:
    """Blocks of rows below each other, ``int`` or ``rows``."""
    first, starts = encs[0], [number * BLOCK for number in range(len(encs))]
    if first.codec == "rows":
        pairs = [
            (enc, start) for enc, start in zip(encs, starts, strict=True) if enc.params["rows"]
        ]
        if not pairs:
            return replace(first, shape=shape)
        encs, starts = [enc for enc, _ in pairs], [start for _, start in pairs]
        first = encs[0]
    parts = {}
    for name in first.tensors:
        values = [enc.tensors[name] for enc in encs]
        if name == "index":
            values = [v + start for v, start in zip(values, starts, strict=True)]
        # Codes and scales are [planes, rows, ...], listed rows and their numbers [rows, ...].
        parts[name] = torch.cat(values, dim=0 if name in ("index", "values") else 1)
    params = dict(first.params)
    if first.codec == "rows":
        params["rows"] = sum(enc.params["rows"] for enc in encs)
    return replace(first, params=params, shape=shape, tensors=parts)


def calibratable(choice: CodecChoice, shape: tuple[int, ...]) -> bool:
    """Can the inputs have a say in the codes?"""
    if choice.codec == "nm24":
        return shape[-1] % 4 == 0
    if choice.codec == "int":
        return IntParams(**choice.params).symmetric
    return choice.codec in ("lowrank", "sum")


def _encode_sum(
    terms: list[dict[str, Any]],
    tensor: torch.Tensor,
    base: torch.Tensor | None,
    hessian: Hessian,
    solver: Solver | None,
) -> Encoded:
    """Each term calibrated for what the ones before it left over."""
    shape = tuple(tensor.shape)
    left_NK = difference(tensor, base).view(matrix_shape(shape))
    codec, encs = cast(SumCodec, CODECS["sum"]), []
    for term in terms:
        settings = {key: value for key, value in term.items() if key != "codec"}
        enc = encode(CodecChoice(term["codec"], settings), left_NK, None, hessian, solver)
        enc = codec.as_term(enc, tensor.dtype)
        left_NK = left_NK - cast(AdditiveCodec, CODECS[enc.codec]).delta(enc)
        encs.append(enc)
    return codec.from_terms(encs, shape, tensor.dtype)
