"""Rows by which a whole matrix is judged: as many as matter, each standing for its share.

Codes of a row depend on that row alone, so the error that a codec makes in a matrix is a sum over
rows, and rows differ little in the share of their change that a codec loses. Drawn with
probabilities proportional to what each would cost if its change were lost (Hansen and Hurwitz,
Annals of Mathematical Statistics, 1943), here at even steps along their running sum, some
hundred rows tell that sum within a percent, of a thousand as of 256,000.

N rows of the matrix, S of them drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Spread:
    """rows_S: numbers of rows, ascending; weight_S: how many times what is found for each counts
    in the sum over all rows, float64."""

    rows_S: torch.Tensor
    weight_S: torch.Tensor

    @classmethod
    def over(cls, lost_N: torch.Tensor, draws: int) -> Spread:
        """lost_N: what each row costs without its change, 0 or more. Every row, with weight 1,
        of a matrix that has no more than are drawn."""
        if len(lost_N) <= draws:
            return cls(torch.arange(len(lost_N)), torch.ones(len(lost_N), dtype=torch.float64))
        lost_N = lost_N.double().cpu()
        if not lost_N.any():
            lost_N = torch.ones_like(lost_N)
        behind_N = lost_N.cumsum(0)
        steps = (torch.arange(draws, dtype=torch.float64) + 0.5) * (behind_N[-1] / draws)
        drawn = torch.searchsorted(behind_N, steps).clamp(max=len(lost_N) - 1)
        rows_S, times_S = drawn.unique(return_counts=True)
        return cls(rows_S, times_S * behind_N[-1] / draws / lost_N[rows_S])

    def total(self, found_S: torch.Tensor) -> float:
        """The sum over all rows, from what was found for those that were drawn."""
        return float(found_S.double().cpu() @ self.weight_S)
