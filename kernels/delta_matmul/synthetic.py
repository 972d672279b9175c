"""Random operands of real shape, made in no time: for benchmarks and tests of the kernels.

Encoding a large matrix takes seconds; random codes cost and behave like real ones.
"""

from __future__ import annotations

from typing import Any

import torch

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.codecs.int import IntParams
from deltaserve.artifact.codecs.lowrank import LowRankParams
from deltaserve.artifact.codecs.nm24 import INDEX_BITS, Nm24Params, kept_columns
from deltaserve.artifact.packing import pack_bits

_PARAMS: dict[str, type] = {"int": IntParams, "nm24": Nm24Params, "lowrank": LowRankParams}
# Of a kept pair: first and second place, ascending.
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))


def random_operand(
    codec: str,
    params: dict[str, Any],
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
    device: str,
) -> Encoded:
    """A weight [outputs, inputs] of ``int``, ``nm24`` or ``lowrank`` with values around 0.01."""
    settings = vars(_PARAMS[codec](**params))
    layout = get_codec(codec).layout(settings, (outputs, inputs), dtype)
    parts = {}
    for name, (kind, shape) in layout.items():
        if name == "scales":
            parts[name] = torch.rand(shape, device=device).mul_(0.01).to(kind)
        elif name == "index":
            parts[name] = _places(outputs, kept_columns(inputs), device)
        elif kind == torch.uint8:
            parts[name] = torch.randint(0, 256, shape, dtype=kind, device=device)
        else:
            parts[name] = (0.05 * torch.randn(shape, device=device)).to(kind)
    return Encoded(codec, settings, (outputs, inputs), dtype, parts)


def _places(rows: int, kept: int, device: str) -> torch.Tensor:
    pairs = torch.tensor(_PAIRS, dtype=torch.uint8, device=device)
    chosen = torch.randint(0, len(_PAIRS), (rows, kept // 2), device=device)
    return pack_bits(pairs[chosen].flatten(1), INDEX_BITS)
