"""One parameter in a chosen codec, by the method that belongs to it."""

from __future__ import annotations

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
from deltaserve.compress.gptq import Solver, encode_int, encode_nm24
from deltaserve.compress.hessian import Hessian
from deltaserve.compress.plan import CodecChoice
from deltaserve.compress.svd import encode_lowrank


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
