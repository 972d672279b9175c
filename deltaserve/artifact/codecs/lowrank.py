"""``lowrank``: the difference as ``scale * (u @ v)``. A LoRA adapter is this codec, exact.

With ``bits`` the factors are quantised themselves, one scale per singular vector, as Delta-CoMe
does (Ping et al., NeurIPS 2024); bands of vectors at different bits are terms of a ``sum``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from deltaserve.artifact.codecs.base import (
    FLOATS,
    AdditiveCodec,
    Encoded,
    Layout,
    difference,
    dtype_name,
    matrix_shape,
    require_finite,
)
from deltaserve.artifact.codecs.params import at_least, one_of, parse_params
from deltaserve.artifact.codecs.quantise import (
    SCALE_DTYPE,
    Grid,
    Plane,
    dequantise_into,
    quantise,
)
from deltaserve.artifact.packing import WIDTHS, pack_bits, packed_size, unpack_bits
from deltaserve.errors import CodecError

# Above this many elements the full SVD takes minutes; the randomised one (Halko et al.,
# SIAM Review 2011) needs only the leading vectors.
FULL_SVD_LIMIT = 1 << 20


@dataclass(frozen=True)
class LowRankParams:
    """rank of the factors; scale multiplies their product.

    factors: their dtype where it is not the parameter's (adapters are often float32).
    bits: of a value of the factors; 0 keeps them in their dtype.
    """

    rank: int = 16
    scale: float = 1.0
    factors: str = ""
    bits: int = 0

    def __post_init__(self) -> None:
        at_least("lowrank", "rank", self.rank, 1)
        one_of("lowrank", "factors", self.factors, ("", *map(dtype_name, FLOATS)))
        one_of("lowrank", "bits", self.bits, (0, *WIDTHS))
        if self.bits and self.factors:
            raise CodecError("codec lowrank: factors of given bits have no dtype")

    @property
    def grids(self) -> tuple[Grid, Grid]:
        """Of u and of v: one scale per singular vector in either."""
        return Grid(self.bits, 0, "column", True, "mse"), Grid(self.bits, 0, "row", True, "mse")


class LowRankCodec(AdditiveCodec):
    """Parts, for a parameter seen as [N, K]: u [N, rank], v [rank, K].

    With bits: u_codes uint8 [N, ceil(rank*bits/8)], u_scales bf16 [1, rank], v_codes uint8
    [rank, ceil(K*bits/8)], v_scales bf16 [rank, 1]; codes are mid-rise as in ``int``.
    """

    name = "lowrank"

    def encode(self, tensor: torch.Tensor, base: torch.Tensor | None, **params: Any) -> Encoded:
        """Truncated SVD; rank is cut to min(N, K). sqrt of the singular values on each side."""
        p = parse_params(LowRankParams, self.name, params)
        rows, columns = matrix_shape(tuple(tensor.shape))
        delta = difference(tensor, base).view(rows, columns)
        rank = min(p.rank, rows, columns)
        u, s, v = leading_svd(delta, rank)
        # Half of the magnitude on each side keeps small deltas away from fp16's underflow.
        root = s.sqrt()
        factors = (u * root), (root[:, None] * v)
        if p.bits:
            u_plane, v_plane = (quantise(x, g) for x, g in zip(factors, p.grids, strict=True))
            return self.from_planes(u_plane, v_plane, p.bits, tuple(tensor.shape), tensor.dtype)
        u, v = (x.to(tensor.dtype) for x in factors)
        return self.from_factors(u, v, 1.0, tuple(tensor.shape), tensor.dtype)

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

    def from_planes(
        self, u: Plane, v: Plane, bits: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Encoded:
        """Quantised factors: u with a scale per column, v with one per row."""
        params: dict[str, Any] = {"rank": u.codes.shape[1], "scale": 1.0, "bits": bits}
        tensors = {
            "u_codes": pack_bits(u.codes, bits),
            "u_scales": u.scales,
            "v_codes": pack_bits(v.codes, bits),
            "v_scales": v.scales,
        }
        return Encoded(self.name, params, shape, dtype, tensors)

    def factors(self, enc: Encoded) -> tuple[torch.Tensor, torch.Tensor]:
        """u [N, rank] and v [rank, K] as they are stored, or float32 if they are quantised."""
        p = parse_params(LowRankParams, self.name, enc.params)
        if not p.bits:
            return enc.tensors["u"], enc.tensors["v"]
        rows, columns = matrix_shape(enc.shape)
        found = []
        for part, shape, grid in zip(
            "uv", ((rows, p.rank), (p.rank, columns)), p.grids, strict=True
        ):
            codes = unpack_bits(enc.tensors[f"{part}_codes"], p.bits, shape[1])
            values = torch.zeros(shape, device=codes.device)
            dequantise_into(values, Plane(codes, enc.tensors[f"{part}_scales"], None), grid)
            found.append(values)
        return found[0], found[1]

    def delta(self, enc: Encoded) -> torch.Tensor:
        u, v = self.factors(enc)
        return (u.float() @ v.float()).mul_(enc.params.get("scale", 1.0)).view(enc.shape)

    def layout(self, params: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
        p = parse_params(LowRankParams, self.name, params)
        rows, columns = matrix_shape(shape)
        if p.bits:
            return {
                "u_codes": (torch.uint8, (rows, packed_size(p.rank, p.bits))),
                "u_scales": (SCALE_DTYPE, (1, p.rank)),
                "v_codes": (torch.uint8, (p.rank, packed_size(columns, p.bits))),
                "v_scales": (SCALE_DTYPE, (p.rank, 1)),
            }
        factors = getattr(torch, p.factors) if p.factors else dtype
        return {"u": (factors, (rows, p.rank)), "v": (factors, (p.rank, columns))}

    def check(self, enc: Encoded) -> None:
        for part in enc.tensors.values():
            require_finite(part)


def leading_svd(delta: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
