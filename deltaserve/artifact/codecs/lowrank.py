"""``lowrank``: the difference as ``scale * (u @ v)``. A LoRA adapter is this codec, exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from deltaserve.artifact.codecs.base import (
    FLOATS,
    Encoded,
    Layout,
    apply_delta,
    difference,
    dtype_name,
    matrix_shape,
    require_finite,
)
from deltaserve.artifact.codecs.params import at_least, one_of, parse_params
from deltaserve.errors import CodecError

# Above this many elements the full SVD takes minutes; the randomised one (Halko et al.,
# SIAM Review 2011) needs only the leading vectors.
FULL_SVD_LIMIT = 1 << 20


@dataclass(frozen=True)
class LowRankParams:
    """rank of the factors; scale multiplies their product.

    factors: their dtype where it is not the parameter's (adapters are often float32).
    """

    rank: int = 16
    scale: float = 1.0
    factors: str = ""

    def __post_init__(self) -> None:
        at_least("lowrank", "rank", self.rank, 1)
        one_of("lowrank", "factors", self.factors, ("", *map(dtype_name, FLOATS)))


class LowRankCodec:
    """Parts, for a parameter seen as [N, K]: u [N, rank], v [rank, K]."""

    name = "lowrank"
    additive = True

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        """Truncated SVD; rank is cut to min(N, K). sqrt of the singular values on each side."""
        p = parse_params(LowRankParams, self.name, params)
        rows, columns = matrix_shape(tuple(tensor.shape))
        delta = difference(tensor, base).view(rows, columns)
        rank = min(p.rank, rows, columns)
        u, s, v = _svd(delta, rank)
        # Half of the magnitude on each side keeps small deltas away from fp16's underflow.
        root = s.sqrt()
        factors = (u * root).to(tensor.dtype), (root[:, None] * v).to(tensor.dtype)
        return self.from_factors(*factors, 1.0, tuple(tensor.shape), tensor.dtype)

    def from_factors(
        self,
        u: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> Encoded:
        """Existing factors, kept as they are: u [N, r], v [r, K], delta = scale * (u @ v)."""
        rows, columns = matrix_shape(shape)
        rank = u.shape[1] if u.dim() == 2 else 0
        if tuple(u.shape) != (rows, rank) or tuple(v.shape) != (rank, columns) or rank == 0:
            raise CodecError(
                f"factors {list(u.shape)} and {list(v.shape)} do not make shape {list(shape)}"
            )
        if u.dtype != v.dtype:
            raise CodecError(f"factors of different dtypes: {u.dtype} and {v.dtype}")
        require_finite(u)
        require_finite(v)
        params: dict[str, Any] = {"rank": rank, "scale": float(scale)}
        if u.dtype != dtype:
            params["factors"] = dtype_name(u.dtype)
        self.layout(params, shape, dtype)
        tensors = {"u": u.contiguous(), "v": v.contiguous()}
        return Encoded(self.name, params, shape, dtype, tensors)

    def delta(self, enc: Encoded) -> torch.Tensor:
        p = parse_params(LowRankParams, self.name, enc.params)
        u, v = enc.tensors["u"].float(), enc.tensors["v"].float()
        return (u @ v).mul_(p.scale).view(enc.shape)

    def decode(self, enc: Encoded, base: torch.Tensor | None) -> torch.Tensor:
        return apply_delta(base, self.delta(enc), enc.dtype)

    def resident_bytes(self, enc: Encoded) -> int:
        return enc.num_bytes

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        p = parse_params(LowRankParams, self.name, params)
        rows, columns = matrix_shape(shape)
        factors = getattr(torch, p.factors) if p.factors else dtype
        return {"u": (factors, (rows, p.rank)), "v": (factors, (p.rank, columns))}

    def check(self, enc: Encoded) -> None:
        require_finite(enc.tensors["u"])
        require_finite(enc.tensors["v"])


def _svd(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading singular triplets: u [N, r], s [r], v [r, K]."""
    # LAPACK squares values on the way: bring tiny and huge deltas near 1 first.
    size = float(delta.abs().max())
    unit = 2.0 ** -math.frexp(size)[1] if size else 1.0
    if delta.numel() <= FULL_SVD_LIMIT or rank * 4 > min(delta.shape):
        u, s, v = torch.linalg.svd(delta * unit, full_matrices=False)
        v = v[:rank]
    else:
        # Its own generator would be better; svd_lowrank only knows the global one.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, right = torch.svd_lowrank(delta * unit, q=rank + 8, niter=4)
        v = right.T[:rank]
    return u[:, :rank], s[:rank] / unit, v
