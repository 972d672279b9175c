"""Scales for given codes: least squares under the Hessian of the inputs.

N outputs, K inputs, G groups per row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from deltaserve.artifact.codecs.quantise import LARGEST_SCALE, SCALE_DTYPE, Grid, expand

if TYPE_CHECKING:
    from deltaserve.compress.gptq import Quantised

# Elements of the systems of equations that are solved at once.
SYSTEMS = 1 << 24


def widen(scales_NG: torch.Tensor, columns: int, grid: Grid) -> torch.Tensor:
    """One scale per value, as [N, K] or what broadcasts to it."""
    return expand(scales_NG, None, slice(None), columns, grid)[0]


def refit(
    delta_NK: torch.Tensor, h_KK: torch.Tensor, found: Quantised, before: torch.Tensor
) -> torch.Tensor:
    """Scales, shaped as before, that minimise tr(e H e.T) of what these codes leave over.

    Where there is no solution, or one that is not positive, the scale stays as it was.
    """
    levels_NK, grid = found.levels_NK, found.grid
    if grid.axis == "tensor":
        solved = _one(delta_NK, h_KK, levels_NK)
    elif grid.axis == "column":
        solved = _columns(delta_NK, h_KK, levels_NK)
    else:
        solved = _groups(delta_NK, h_KK, levels_NK, grid, before.shape[1])
    good = torch.isfinite(solved) & (solved > 0)
    scales = torch.where(good, solved, before)
    return scales.clamp(max=LARGEST_SCALE).to(SCALE_DTYPE).float()


def _one(delta_NK: torch.Tensor, h_KK: torch.Tensor, levels_NK: torch.Tensor) -> torch.Tensor:
    """[1, 1]: s = tr(C H d.T) / tr(C H C.T)."""
    pushed_NK = levels_NK @ h_KK
    return ((pushed_NK * delta_NK).sum() / (pushed_NK * levels_NK).sum()).view(1, 1)


def _columns(delta_NK: torch.Tensor, h_KK: torch.Tensor, levels_NK: torch.Tensor) -> torch.Tensor:
    """[1, K]: ((C.T C) o H) s = rowsum of C.T o (H d.T)."""
    system_KK = (levels_NK.T @ levels_NK) * h_KK
    target_K = ((delta_NK @ h_KK) * levels_NK).sum(0)
    return _solve(system_KK[None], target_K[None])


def _groups(
    delta_NK: torch.Tensor, h_KK: torch.Tensor, levels_NK: torch.Tensor, grid: Grid, groups: int
) -> torch.Tensor:
    """[N, G]. With C [K, G] the levels of one row, a column per group: (C.T H C) s = C.T H d."""
    rows, columns = delta_NK.shape
    width = columns if groups == 1 else grid.group
    scales_NG = torch.empty(rows, groups, device=delta_NK.device)

    def by_group(x_NK: torch.Tensor) -> torch.Tensor:
        wide = -x_NK.shape[1] % width
        return pad(x_NK, (0, wide)).unflatten(1, (-1, width)).sum(2)

    step = max(1, SYSTEMS // (groups * groups))
    for some in (slice(i, min(i + step, rows)) for i in range(0, rows, step)):
        c_NK = levels_NK[some]
        system_NGG = torch.empty(len(c_NK), groups, groups, device=c_NK.device)
        for g in range(groups):  # symmetric: only what lies to the right of each group
            mine, right = slice(g * width, min((g + 1) * width, columns)), g * width
            found_NG = by_group((c_NK[:, mine] @ h_KK[mine, right:]) * c_NK[:, right:])
            system_NGG[:, g, g:] = system_NGG[:, g:, g] = found_NG
        scales_NG[some] = _solve(system_NGG, by_group((delta_NK[some] @ h_KK) * c_NK))
    return scales_NG


def _solve(system_NGG: torch.Tensor, target_NG: torch.Tensor) -> torch.Tensor:
    diagonal_NG = system_NGG.diagonal(dim1=1, dim2=2)
    # A group whose levels are all 0 has no say; 1 keeps its equation solvable.
    diagonal_NG += 1e-6 * diagonal_NG.mean(1, keepdim=True)
    diagonal_NG += (diagonal_NG == 0).float()
    solved_NG1, _ = torch.linalg.solve_ex(system_NGG, target_NG[..., None])
    return solved_NG1[..., 0]
