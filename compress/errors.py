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
    wrong, size = squares(enc, tensor, base)
    return math.sqrt(wrong) / math.sqrt(size) if size else 0.0


def squares(enc: Encoded, tensor: torch.Tensor, base: torch.Tensor | None) -> tuple[float, float]:
    """Squared norms of what is wrong and of the exact delta; zeros for exact codecs."""
    codec = get_codec(enc.codec)
    if enc.codec in ("raw", "xor") or (enc.codec == "rows" and enc.params["bits"] == 0):
        return 0.0, 0.0
    exact = difference(tensor, base)
    if codec.additive:
        stored = cast(AdditiveCodec, codec).delta(enc)
    else:
        stored = difference(codec.decode(enc, base), base)
    size = _square(exact)
    return _square(stored.sub_(exact)), size


def _square(x: torch.Tensor) -> float:
    """Squared Frobenius norm in double precision, so that no magnitude overflows."""
    return sum(float(c.double().square().sum()) for c in x.flatten().split(CHUNK))
