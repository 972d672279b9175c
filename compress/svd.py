"""Low rank for what it does to the outputs: singular vectors weighted by the inputs.

With H = L L.T the Hessian of the inputs, the best u v of a rank in tr((d - u v) H (d - u v).T)
is the truncated SVD of d L, with v = v' L^-1 (SVD-LLM, Wang et al., ICLR 2025). At given bits
the factors are quantised one after the other with error feedback, u for the v that was stored
(bands at bits of their own: ``delta_come``).
"""

from __future__ import annotations

import torch

from deltaserve.artifact.codecs.base import Encoded, difference, matrix_shape
from deltaserve.artifact.codecs.lowrank import LowRankCodec, LowRankParams
from deltaserve.artifact.codecs.quantise import SCALE_DTYPE, Plane
from deltaserve.compress.gptq import Quantised, Solver, calibrated
from deltaserve.compress.hessian import Hessian


def encode_lowrank(
    tensor: torch.Tensor,
    base: torch.Tensor | None,
    params: LowRankParams,
    hessian: Hessian,
    solver: Solver | None = None,
) -> Encoded:
    """``lowrank``, calibrated. tensor, base: seen as [N, K]; rank is cut to min(N, K)."""
    shape = tuple(tensor.shape)
    delta_NK = difference(tensor, base).view(matrix_shape(shape)).to(hessian.sum_KK.device)
    rank = min(params.rank, *delta_NK.shape)
    u_NR, v_RK = weighted_svd(delta_NK, hessian, rank)
    if not params.bits:
        factors = u_NR.to(tensor.dtype).cpu(), v_RK.to(tensor.dtype).cpu()
        return LowRankCodec().from_factors(*factors, 1.0, shape, tensor.dtype)
    u_grid, v_grid = params.grids
    v = calibrated(v_RK, hessian, v_grid, solver=solver)
    h_KK = hessian.damped()
    stored_RK = v.values_NK.to(h_KK.device)
    inner = Hessian.of(stored_RK @ h_KK @ stored_RK.T)
    target_NR = _least_squares(delta_NK @ h_KK @ stored_RK.T, inner)
    u = calibrated(target_NR, inner, u_grid, solver=solver)
    return LowRankCodec().from_planes(_plane(u), _plane(v), params.bits, shape, tensor.dtype)


def weighted_svd(
    delta_NK: torch.Tensor, hessian: Hessian, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """u [N, r] and v [r, K], as large as each other in each direction."""
    lower_KK = hessian.root()
    u_NR, s_R, w_RK = hessian.leading(delta_NK, rank)
    v_RK = torch.linalg.solve_triangular(lower_KK, w_RK, upper=False, left=False)
    # Half of the magnitude on each side keeps small deltas away from fp16's underflow.
    size_R = v_RK.norm(dim=1)
    safe_R = torch.where(size_R > 0, size_R, 1.0)
    root_R = (s_R * size_R).sqrt()
    return u_NR * root_R, v_RK * (root_R / safe_R)[:, None]


def _least_squares(product_NR: torch.Tensor, inner: Hessian) -> torch.Tensor:
    """product @ inner^-1; vectors that were stored as zeros stay out of it."""
    lower_RR = inner.root()
    return torch.cholesky_solve(product_NR.T, lower_RR).T


def _plane(found: Quantised) -> Plane:
    return Plane(found.codes_NK, found.scales_NG.to(SCALE_DTYPE), None)
