"""Quantising a delta with error feedback: what one column gets wrong, the later ones mend.

Optimal brain surgeon updates column by column (GPTQ, Frantar et al., ICLR 2023), on the
delta instead of the weight, and with 2 of 4 values dropped on the way (SparseGPT, Frantar
and Alistarh, ICML 2023), which is DeltaZip (Yao et al., EuroSys 2025). In addition the
scales are refitted to the codes by least squares under the same Hessian.

N outputs, K inputs, G groups per row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from deltaserve.artifact.codecs.base import Encoded, difference, matrix_shape
from deltaserve.artifact.codecs.int import IntCodec, IntParams
from deltaserve.artifact.codecs.nm24 import Nm24Codec, Nm24Params
from deltaserve.artifact.codecs.quantise import (
    SCALE_DTYPE,
    Grid,
    Plane,
    fit_matrix,
    nearest,
)
from deltaserve.compress.hessian import Hessian, output_error
from deltaserve.compress.scales import refit, widen

# Columns whose errors are applied to the rest in one multiplication; a multiple of 4.
BLOCK = 128
# A further round (codes for the scales, scales for the codes) must save this share of the error.
WORTHWHILE = 0.02
# From so many bits on scales are not refitted: with 8 they gain less than a thousandth.
FINE = 8


@dataclass(frozen=True)
class Solver:
    """rounds: most times that codes and scales are fitted to each other; 1 without ``refit``.

    order: columns with large inputs are decided first (GPTQ's activation ordering). refit: the
    scales too are fitted under the Hessian, where published solvers leave them as rounding has
    them. The number of rounds follows from the calibration text alone, see ``WORTHWHILE``.
    """

    rounds: int = 6
    order: bool = True
    refit: bool = True


@dataclass(frozen=True)
class Quantised:
    """codes uint8 [N, K]; kept bool [N, K]; scales float32 that bf16 holds exactly, [N, G], or
    [1, K] or [1, 1] where rows share them."""

    codes_NK: torch.Tensor
    kept_NK: torch.Tensor
    scales_NG: torch.Tensor
    grid: Grid

    @property
    def levels_NK(self) -> torch.Tensor:
        """Codes as multiples of their scale; 0 where nothing is kept."""
        return torch.where(self.kept_NK, self.codes_NK.float() - self.grid.top / 2, 0.0)

    @property
    def values_NK(self) -> torch.Tensor:
        return self.levels_NK * widen(self.scales_NG, self.codes_NK.shape[1], self.grid)


def encode_int(
    tensor: torch.Tensor,
    base: torch.Tensor | None,
    params: IntParams,
    hessian: Hessian,
    solver: Solver | None = None,
) -> Encoded:
    """``int`` with symmetric planes, calibrated; each plane stores what the earlier ones left."""
    left_NK = difference(tensor, base).view(matrix_shape(tuple(tensor.shape)))
    planes = []
    for _ in range(params.planes):
        found = calibrated(left_NK, hessian, params.grid, sparse=False, solver=solver)
        planes.append(Plane(found.codes_NK, found.scales_NG.to(SCALE_DTYPE), None))
        left_NK = left_NK - found.values_NK
    return IntCodec().from_planes(planes, params, tuple(tensor.shape), tensor.dtype)


def encode_nm24(
    tensor: torch.Tensor,
    base: torch.Tensor | None,
    params: Nm24Params,
    hessian: Hessian,
    solver: Solver | None = None,
) -> Encoded:
    """``nm24``, calibrated; K must be a multiple of 4."""
    delta_NK = difference(tensor, base).view(matrix_shape(tuple(tensor.shape)))
    # The codec's grid counts kept values; here every column is still there.
    grid = Grid(params.bits, params.group_size, "group", True, params.clip)
    found = calibrated(delta_NK, hessian, grid, sparse=True, solver=solver)
    plane = Plane(found.codes_NK, found.scales_NG.to(SCALE_DTYPE), None)
    shape = tuple(tensor.shape)
    return Nm24Codec().from_codes(plane, found.kept_NK, params, shape, tensor.dtype)


def calibrated(
    delta_NK: torch.Tensor,
    hessian: Hessian,
    grid: Grid,
    *,
    sparse: bool = False,
    solver: Solver | None = None,
) -> Quantised:
    """Codes and scales of the delta with the least output error found, row by row.

    Never worse than plain rounding under this Hessian: that is the first candidate.
    """
    solver = solver or Solver()
    h_KK = hessian.damped()
    delta_NK = delta_NK.to(h_KK.device)
    # Large inputs first, while there are many columns left to mend their errors.
    order_K = h_KK.diagonal().argsort(descending=True)
    if sparse or not solver.order:  # neighbours must stay neighbours
        order_K = torch.arange(len(h_KK), device=h_KK.device)
    factor_KK = hessian.inverse_factor(order_K)
    best = found = _plain(delta_NK, grid, sparse)
    error_N = output_error(delta_NK - best.values_NK, h_KK)
    for _ in range(solver.rounds if grid.bits < FINE else min(1, solver.rounds)):
        codes_NK, kept_NK = _feedback(delta_NK, factor_KK, order_K, found.scales_NG, grid, sparse)
        found = Quantised(codes_NK, kept_NK, found.scales_NG, grid)
        if solver.refit and grid.bits < FINE:
            found = replace(found, scales_NG=refit(delta_NK, h_KK, found, found.scales_NG))
        before = float(error_N.sum())
        best, error_N = _better(delta_NK, h_KK, best, error_N, found)
        if not solver.refit or float(error_N.sum()) > before * (1 - WORTHWHILE):
            break
    return Quantised(best.codes_NK.cpu(), best.kept_NK.cpu(), best.scales_NG.cpu(), grid)


def two_of_four(size_NK: torch.Tensor) -> torch.Tensor:
    """Mask of the two largest of each 4 columns."""
    fours = size_NK.unflatten(1, (-1, 4))
    mask = torch.zeros_like(fours, dtype=torch.bool)
    return mask.scatter_(2, fours.topk(2, dim=2).indices, True).flatten(1)


def _plain(delta_NK: torch.Tensor, grid: Grid, sparse: bool) -> Quantised:
    kept_NK, fitted_NK, fit_grid = torch.ones_like(delta_NK, dtype=torch.bool), delta_NK, grid
    if sparse:
        # Dropped values must not bias the scales: the kept half is a matrix of its own.
        kept_NK = two_of_four(delta_NK.abs())
        fitted_NK = delta_NK[kept_NK].view(len(delta_NK), -1)
        fit_grid = replace(grid, group=grid.group // 2)
    scales_NG = fit_matrix(fitted_NK, fit_grid)[0].float().to(delta_NK.device)
    scale_NK = widen(scales_NG, delta_NK.shape[1], grid)
    codes_NK = nearest(delta_NK, scale_NK, grid.top / 2, grid.top).to(torch.uint8)
    return Quantised(codes_NK, kept_NK, scales_NG, grid)


def _feedback(
    delta_NK: torch.Tensor,
    factor_KK: torch.Tensor,
    order_K: torch.Tensor,
    scales_NG: torch.Tensor,
    grid: Grid,
    sparse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 and mask [N, K], columns decided in ``order_K``, errors passed on.

    Transposed inside: a column must be contiguous, so short are the steps.
    """
    columns, middle = delta_NK.shape[1], grid.top / 2
    left_KN = delta_NK[:, order_K].T.contiguous()
    scale_KN = widen(scales_NG, columns, grid).expand_as(delta_NK)[:, order_K].T.contiguous()
    steps_KN = torch.where(scale_KN == 0, 1.0, scale_KN).reciprocal()
    codes_KN = torch.empty_like(left_KN)
    kept_KN = torch.ones_like(left_KN, dtype=torch.bool)
    pivots = factor_KK.diagonal().tolist()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors_BN = torch.empty_like(left_KN[start:stop])
        for k in range(start, stop):
            if sparse and k % 4 == 0:
                four = slice(k, k + 4)
                size_4N = left_KN[four] / factor_KK.diagonal()[four, None]
                kept_KN[four] = two_of_four(size_4N.abs().T).T
            code_N = (left_KN[k] * steps_KN[k]).add_(middle).round_().clamp_(0, grid.top)
            codes_KN[k] = code_N
            value_N = code_N.sub_(middle).mul_(scale_KN[k])
            if sparse:
                value_N *= kept_KN[k]
            torch.sub(left_KN[k], value_N, out=errors_BN[k - start])
            errors_BN[k - start] /= pivots[k]
            left_KN[k:stop].addr_(factor_KK[k, k:stop], errors_BN[k - start], alpha=-1)
        left_KN[stop:] -= factor_KK[start:stop, stop:].T @ errors_BN
    back_K = order_K.argsort()
    return codes_KN[back_K].T.to(torch.uint8).contiguous(), kept_KN[back_K].T.contiguous()


def _better(
    delta_NK: torch.Tensor,
    h_KK: torch.Tensor,
    best: Quantised,
    error_N: torch.Tensor,
    found: Quantised,
) -> tuple[Quantised, torch.Tensor]:
    """Of each row the better of the two."""
    mine_N = output_error(delta_NK - found.values_NK, h_KK)
    wins_N = mine_N < error_N
    if len(best.scales_NG) != len(delta_NK):  # rows that share scales win or lose together
        wins_N = (mine_N.sum() < error_N.sum()).expand(len(delta_NK))
    wins_N1 = wins_N[:, None]
    chosen = Quantised(
        torch.where(wins_N1, found.codes_NK, best.codes_NK),
        torch.where(wins_N1, found.kept_NK, best.kept_NK),
        torch.where(wins_N1[: len(best.scales_NG)], found.scales_NG, best.scales_NG),
        best.grid,
    )
    return chosen, torch.where(wins_N, mine_N, error_N)
