"""How far a stored delta is from the exact one."""

from __future__ import annotations

import math
from typing import cast

import torch

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import AdditiveCodec, Encoded, difference

CHUNK = 1 << 20


def relative_error(enc: Encoded, tensor: torch.Tensor, base: torch.Tensor | None) -> float:
    """||decoded - exact|| / ||exact|| of the delta, Frobenius norms; 0 for exact codecs.

    Additive codecs are measured before the sum is rounded to the parameter's dtype: that
    is how an engine applies them.
    """
    codec = get_codec(enc.codec)
    if enc.codec in ("raw", "xor") or (enc.codec == "rows" and enc.params["bits"] == 0):
        return 0.0
    exact = difference(tensor, base)
    if codec.additive:
        stored = cast(AdditiveCodec, codec).delta(enc)
    else:
        stored = difference(codec.decode(enc, base), base)
    size = _norm(exact)
    wrong = _norm(stored.sub_(exact))
    return wrong / size if size else 0.0


def _norm(x: torch.Tensor) -> float:
    """Frobenius norm in double precision, so that no magnitude overflows."""
    return math.sqrt(sum(float(c.double().square().sum()) for c in x.flatten().split(CHUNK)))
