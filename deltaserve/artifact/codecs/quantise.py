"""Uniform quantisation of a matrix in groups: the arithmetic behind ``int`` and ``nm24``.

Symmetric (mid-rise): ``x ~ (q - (2^b - 1) / 2) * s``; b = 1 is sign x scale.
Asymmetric: ``x ~ (q - z) * s`` with an integer zero point, so that exact zeros stay zero.

Shapes: x [N, K]; scales and zeros [N, G], [1, K] or [1, 1]; M groups of L values in ``fit``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# float32 working set of one step, in elements: 4 MB stay in the cache.
CHUNK = 1 << 20
# Shrink factors tried by clip="mse": 0.92 .. 0.92^15 = 0.29 of the absmax scale.
SHRINKS = tuple(0.92**i for i in range(1, 16))
SCALE_DTYPE = torch.bfloat16
LARGEST_SCALE = torch.finfo(SCALE_DTYPE).max


@dataclass(frozen=True)
class Grid:
    """How values become codes. axis: group, row, column or tensor; group 0 = the whole row."""

    bits: int
    group: int
    axis: str
    symmetric: bool
    clip: str

    @property
    def top(self) -> int:
        return (1 << self.bits) - 1

    def groups(self, columns: int) -> int:
        """Groups per row for axis group and row; the last one may be shorter."""
        if self.axis == "row" or self.group == 0:
            return 1
        return -(-columns // self.group)

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        if self.axis == "column":
            return 1, columns
        if self.axis == "tensor":
            return 1, 1
        return rows, self.groups(columns)


@dataclass(frozen=True)
class Plane:
    """One quantised matrix. codes uint8 [N, K] unpacked; scales bf16; zeros uint8 or None."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None


def quantise(x: torch.Tensor, grid: Grid) -> Plane:
    """Quantise float32 ``x`` [N, K] and leave in ``x`` what the plane does not explain."""
    scales, zeros = fit_matrix(x, grid)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    for rows in row_chunks(*x.shape):
        scale, zero = expand(scales, zeros, rows, x.shape[1], grid)
        q = nearest(x[rows], scale, zero, grid.top)
        codes[rows] = q.to(torch.uint8)
        x[rows] -= (q - zero) * scale
    return Plane(codes, scales, zeros if not grid.symmetric else None)


def dequantise_into(out: torch.Tensor, plane: Plane, grid: Grid) -> None:
    """Add the plane's values to float32 ``out`` [N, K]."""
    zeros = plane.zeros
    for rows in row_chunks(*out.shape):
        scale, zero = expand(plane.scales, zeros, rows, out.shape[1], grid)
        out[rows] += (plane.codes[rows].float() - zero) * scale


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Slices of rows of about ``CHUNK`` elements each."""
    step = max(1, CHUNK // max(1, columns))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def expand(
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    rows: slice,
    columns: int,
    grid: Grid,
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """Scales and zero points of some rows, float32, broadcastable to [rows, K]."""

    def widen(t: torch.Tensor) -> torch.Tensor:
        t = (t if t.shape[0] == 1 else t[rows]).float()
        per_group = grid.axis == "group" and grid.group and t.shape[1] > 1
        return t.repeat_interleave(grid.group, dim=1)[:, :columns] if per_group else t

    return widen(scales), grid.top / 2 if zeros is None else widen(zeros)


def nearest(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, top: int
) -> torch.Tensor:
    """Nearest codes, float32; a zero scale decodes to zero whatever the code."""
    safe = torch.where(scale == 0, 1.0, scale)
    return torch.div(x, safe).add_(zero).round_().clamp_(0, top)


def fit_matrix(x: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales, and zero points if asymmetric, of all groups of ``x`` [N, K]; see ``fit``."""
    rows, columns = x.shape
    shape = grid.scale_shape(rows, columns)
    scales = torch.empty(shape, dtype=SCALE_DTYPE)
    zeros = None if grid.symmetric else torch.empty(shape, dtype=torch.uint8)

    def put(where: tuple[slice, slice], groups_ML: torch.Tensor) -> None:
        scale, zero = fit(groups_ML, grid)
        scales[where] = scale.view(scales[where].shape)
        if zeros is not None:
            assert zero is not None
            zeros[where] = zero.view(zeros[where].shape)

    everything = slice(None)
    if grid.axis == "tensor":
        put((everything, everything), x.reshape(1, -1))
    elif grid.axis == "column":
        for some in row_chunks(columns, rows):
            put((everything, some), x[:, some].T.contiguous())
    else:
        # A short last group is fitted on its own: padding would bias means and errors.
        width = columns if grid.axis == "row" or grid.group == 0 else grid.group
        whole = columns // width
        for some in row_chunks(rows, columns):
            if whole:
                put((some, slice(0, whole)), x[some, : whole * width].reshape(-1, width))
            if columns % width:
                put((some, slice(whole, whole + 1)), x[some, whole * width :].contiguous())
    return scales, zeros


def fit(x: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point of each row of ``x`` [M, L]: bf16 [M, 1], uint8 [M, 1] or None.

    clip "absmax" covers the whole range, so that no value is off by more than half a
    step. clip "mse" tries smaller scales and keeps, per group, the one with the least
    squared error, measured with the scale as it will be stored. Below magnitudes of
    1e-19 the squares vanish in float32 and absmax stays.
    """
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if grid.symmetric:
        step = torch.maximum(-low, high) * (2 / grid.top)
        zero = torch.full_like(step, grid.top / 2)
    else:
        # Zero must be representable: exact zeros of a sparse delta stay exact.
        low, high = low.clamp(max=0), high.clamp(min=0)
        step = high / grid.top - low / grid.top
        zero = torch.where(step == 0, 0.0, -low / step).round().clamp(0, grid.top)
    best = _stored(step)
    if grid.clip == "mse":
        best = _search(x, step, best, zero, grid)
    return best.to(SCALE_DTYPE), None if grid.symmetric else zero.to(torch.uint8)


def _search(
    x: torch.Tensor, step: torch.Tensor, best: torch.Tensor, zero: torch.Tensor, grid: Grid
) -> torch.Tensor:
    error, refit = _try(x, best, zero, grid.top)
    if grid.symmetric and grid.bits == 1:
        # Two levels ±s/2: the best s is known, twice the mean magnitude (BitDelta).
        candidates = [2 * x.abs().mean(1, keepdim=True)]
    else:
        candidates = [step * shrink for shrink in SHRINKS]
    for candidate in candidates:
        best, error, refit = _better(x, _stored(candidate), best, error, refit, zero, grid.top)
    # Least squares for the winner's codes: s = <x, c> / <c, c>.
    return _better(x, _stored(refit), best, error, refit, zero, grid.top)[0]


def _better(
    x: torch.Tensor,
    scale: torch.Tensor,
    best: torch.Tensor,
    best_error: torch.Tensor,
    best_refit: torch.Tensor,
    zero: torch.Tensor,
    top: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    error, refit = _try(x, scale, zero, top)
    wins = error < best_error
    return (
        torch.where(wins, scale, best),
        torch.where(wins, error, best_error),
        torch.where(wins, refit, best_refit),
    )


def _try(
    x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, top: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error [M, 1] with these scales, and the least-squares scale for their codes."""
    error = torch.zeros_like(scale)
    dot, norm = torch.zeros_like(scale), torch.zeros_like(scale)
    for some in x.split(max(1, CHUNK // x.shape[0]), dim=1):
        levels = nearest(some, scale, zero, top).sub_(zero)
        dot += (levels * some).sum(1, keepdim=True)
        norm += levels.square().sum(1, keepdim=True)
        error += levels.mul_(scale).sub_(some).square_().sum(1, keepdim=True)
    return error, torch.where(norm == 0, 0.0, dot / norm)


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """The scale as bfloat16 will hold it; float32's largest values must not become infinite."""
    return scale.clamp(0, LARGEST_SCALE).to(SCALE_DTYPE).float()
