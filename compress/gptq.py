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
from torch.nn.functional import pad

from deltaserve.artifact.codecs.base import Encoded, difference, matrix_shape
from deltaserve.artifact.codecs.int import IntCodec, IntParams
from deltaserve.artifact.codecs.nm24 import Nm24Codec, Nm24Params
from deltaserve.artifact.codecs.quantise import (
    LARGEST_SCALE,
    SCALE_DTYPE,
    Grid,
    Plane,
    expand,
    fit_matrix,
    nearest,
)
from deltaserve.compress.hessian import Hessian, inverse_factor, output_error

# Columns whose errors are applied to the rest in one multiplication; a multiple of 4.
BLOCK = 128
# Codes for the scales, scales for the codes, in turn.
ROUNDS = 5
# Elements of the systems of equations that are solved at once.
SYSTEMS = 1 << 24


@dataclass(frozen=True)
class Quantised:
    """codes uint8 [N, K]; kept bool [N, K]; scales float32 [N, G] that bf16 holds exactly."""

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
    tensor: torch.Tensor, base: torch.Tensor | None, params: IntParams, hessian: Hessian
) -> Encoded:
    """``int`` with one symmetric plane in groups or rows, calibrated."""
    delta_NK = difference(tensor, base).view(matrix_shape(tuple(tensor.shape)))
    found = calibrated(delta_NK, hessian, params.grid, sparse=False)
    plane = Plane(found.codes_NK, found.scales_NG.to(SCALE_DTYPE), None)
    return IntCodec().from_codes(plane, params, tuple(tensor.shape), tensor.dtype)


def encode_nm24(
    tensor: torch.Tensor, base: torch.Tensor | None, params: Nm24Params, hessian: Hessian
) -> Encoded:
    """``nm24``, calibrated; K must be a multiple of 4."""
    delta_NK = difference(tensor, base).view(matrix_shape(tuple(tensor.shape)))
    # The codec's grid counts kept values; here every column is still there.
    grid = Grid(params.bits, params.group_size, "group", True, params.clip)
    found = calibrated(delta_NK, hessian, grid, sparse=True)
    plane = Plane(found.codes_NK, found.scales_NG.to(SCALE_DTYPE), None)
    shape = tuple(tensor.shape)
    return Nm24Codec().from_codes(plane, found.kept_NK, params, shape, tensor.dtype)


def calibrated(delta_NK: torch.Tensor, hessian: Hessian, grid: Grid, *, sparse: bool) -> Quantised:
    """Codes and scales of the delta with the least output error found, row by row.

    Never worse than plain rounding under this Hessian: that is the first candidate.
    """
    device = hessian.sum_KK.device
    delta_NK, h_KK = delta_NK.to(device), hessian.damped()
    # Large inputs first, while there are many columns left to mend their errors.
    order_K = h_KK.diagonal().argsort(descending=True)
    if sparse:  # neighbours must stay neighbours
        order_K = torch.arange(len(h_KK), device=device)
    factor_KK = inverse_factor(hessian, order_K)
    best = _plain(delta_NK, grid, sparse)
    error_N = output_error(delta_NK - best.values_NK, h_KK)
    found = best
    for _ in range(ROUNDS):
        codes_NK, kept_NK = _feedback(delta_NK, factor_KK, order_K, found.scales_NG, grid, sparse)
        found = Quantised(codes_NK, kept_NK, found.scales_NG, grid)
        found = Quantised(codes_NK, kept_NK, _refit(delta_NK, h_KK, found), grid)
        best, error_N = _better(delta_NK, h_KK, best, error_N, found)
    return Quantised(best.codes_NK.cpu(), best.kept_NK.cpu(), best.scales_NG.cpu(), grid)


def widen(scales_NG: torch.Tensor, columns: int, grid: Grid) -> torch.Tensor:
    """One scale per value: [N, K], or [N, 1] where a row has only one."""
    return expand(scales_NG, None, slice(None), columns, grid)[0]


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
    """Codes uint8 and mask [N, K], columns decided in ``order_K``, errors passed on."""
    columns, middle = delta_NK.shape[1], grid.top / 2
    left_NK = delta_NK[:, order_K]
    scale_NK = widen(scales_NG, columns, grid).expand_as(delta_NK)[:, order_K]
    codes_NK = torch.empty_like(left_NK)
    kept_NK = torch.ones_like(left_NK, dtype=torch.bool)
    pivots_K = factor_KK.diagonal()
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors_NB = torch.empty_like(left_NK[:, start:stop])
        for k in range(start, stop):
            if sparse and k % 4 == 0:
                four = slice(k, k + 4)
                kept_NK[:, four] = two_of_four((left_NK[:, four] / pivots_K[four]).abs())
            codes_NK[:, k] = nearest(left_NK[:, k], scale_NK[:, k], middle, grid.top)
            value_N = (codes_NK[:, k] - middle) * scale_NK[:, k] * kept_NK[:, k]
            error_N = (left_NK[:, k] - value_N) / pivots_K[k]
            left_NK[:, k:stop] -= error_N[:, None] * factor_KK[k, k:stop]
            errors_NB[:, k - start] = error_N
        left_NK[:, stop:] -= errors_NB @ factor_KK[start:stop, stop:]
    back_K = order_K.argsort()
    return codes_NK[:, back_K].to(torch.uint8), kept_NK[:, back_K]


def _refit(delta_NK: torch.Tensor, h_KK: torch.Tensor, found: Quantised) -> torch.Tensor:
    """Scales [N, G] that minimise the output error for these codes.

    With C [K, G] the levels of one row, a column per group: (C.T H C) s = C.T H d.
    """
    groups = found.scales_NG.shape[1]
    rows, columns = delta_NK.shape
    width = columns if groups == 1 else found.grid.group
    scales_NG = torch.empty_like(found.scales_NG)
    levels_NK = found.levels_NK

    def by_group(x_NK: torch.Tensor) -> torch.Tensor:
        return pad(x_NK, (0, groups * width - columns)).unflatten(1, (groups, width)).sum(2)

    step = max(1, SYSTEMS // (groups * groups))
    for some in (slice(i, min(i + step, rows)) for i in range(0, rows, step)):
        c_NK = levels_NK[some]
        system_NGG = torch.empty(len(c_NK), groups, groups, device=c_NK.device)
        for g in range(groups):
            mine = slice(g * width, min((g + 1) * width, columns))
            system_NGG[:, :, g] = by_group((c_NK[:, mine] @ h_KK[mine]) * c_NK)
        target_NG = by_group((delta_NK[some] @ h_KK) * c_NK)
        diagonal_NG = system_NGG.diagonal(dim1=1, dim2=2)
        # A group whose levels are all 0 has no say; 1 keeps its equation solvable.
        diagonal_NG += 1e-6 * diagonal_NG.mean(1, keepdim=True)
        diagonal_NG += (diagonal_NG == 0).float()
        solved_NG, _ = torch.linalg.solve_ex(system_NGG, target_NG[..., None])
        scales_NG[some] = solved_NG[..., 0]
    # Unsolvable rows keep the scales they had, and so do groups that would turn negative.
    good = torch.isfinite(scales_NG) & (scales_NG > 0)
    scales_NG = torch.where(good, scales_NG, found.scales_NG)
    return scales_NG.clamp(max=LARGEST_SCALE).to(SCALE_DTYPE).float()


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
    wins_N1 = wins_N[:, None]
    chosen = Quantised(
        torch.where(wins_N1, found.codes_NK, best.codes_NK),
        torch.where(wins_N1, found.kept_NK, best.kept_NK),
        torch.where(wins_N1, found.scales_NG, best.scales_NG),
        best.grid,
    )
    return chosen, torch.where(wins_N, mine_N, error_N)
