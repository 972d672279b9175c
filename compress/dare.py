"""Dropping most of a difference: DARE, and magnitude pruning, its plainer rival.

DARE (Yu et al., ICML 2024) keeps each value with probability p and divides what it keeps by p,
so that the expected output stays; pruning by magnitude keeps the largest, as they are. Neither
looks at inputs. They are here as baselines that others are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deltaserve.artifact.codecs.base import Encoded, difference, matrix_shape
from deltaserve.artifact.codecs.sparse import SparseCodec
from deltaserve.errors import CodecError


@dataclass(frozen=True)
class DropParams:
    """keep: share of values kept; random: which ones, else the largest; seed: draws them."""

    keep: float = 0.1
    random: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise CodecError(f"codec sparse: keep must lie above 0 and up to 1, not {self.keep}")


def encode_dropped(tensor: torch.Tensor, base: torch.Tensor | None, params: DropParams) -> Encoded:
    """``sparse`` of what is kept."""
    shape = tuple(tensor.shape)
    delta_NK = difference(tensor, base).view(matrix_shape(shape))
    if params.random:
        generator = torch.Generator().manual_seed(params.seed)
        kept_NK = torch.rand(delta_NK.shape, generator=generator) < params.keep
        delta_NK = torch.where(kept_NK, delta_NK / params.keep, 0.0)
    else:
        count = max(1, round(params.keep * delta_NK.numel()))
        least = delta_NK.abs().flatten().kthvalue(delta_NK.numel() - count + 1).values
        delta_NK = torch.where(delta_NK.abs() >= least, delta_NK, 0.0)
    return SparseCodec().from_values(delta_NK, shape, tensor.dtype)
