"""Bringing numbers of different origin to one scale: utilities, embeddings.

n samples, d dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltaserve.errors import SelectionError

# Beyond these quantiles of their source only the rank of a utility counts: one absurd value must
# not flatten all others.
TAIL = 0.01
# Of equal utilities, up to this much is drawn by lot.
LOT = 1e-3
# Added to every variance, as a share of their mean: directions with hardly any variance are
# noise, and whitening without a floor would make them as loud as the rest.
RIDGE = 0.1
SAMPLE = 100_000


def check_utility(utility: np.ndarray, count: int, where: str) -> np.ndarray:
    """As float64 [n]. Raises SelectionError naming the first row that is not finite."""
    values = np.asarray(utility)
    if values.shape != (count,) or values.dtype.kind not in "fiub":
        raise SelectionError(
            f"{where}: utilities must be {count:,} numbers, one a sample, not {values.dtype} of "
            f"shape {list(values.shape)}"
        )
    values = values.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise SelectionError(
            f"{where}: the utility of sample {bad[0]} is {values[bad[0]]}, as are those of "
            f"{len(bad):,} samples in all; utilities must be finite"
            if len(bad) > 1
            else f"{where}: the utility of sample {bad[0]} is {values[bad[0]]}; utilities must be "
            "finite"
        )
    return values


def min_centred(utility: np.ndarray) -> np.ndarray:
    """Shifted so that the lowest is 0, as the objective needs utilities of 0 or more."""
    return utility - utility.min()


def robust_scaled(utility: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Each source's utilities on 0 to 1, in their order.

    The range from the 1st to the 99th percentile is mapped linearly to 0.01 to 0.99; the tails
    beyond share the rest by rank. utility: float64 [n]; codes: int [n], the source of each. A
    source whose utilities are all the same has no order of its own and gets 0.5.
    """
    scaled = np.empty(len(utility))
    for code in np.unique(codes):
        rows = codes == code
        scaled[rows] = _one_scaled(utility[rows])
    return scaled


def _one_scaled(u: np.ndarray) -> np.ndarray:
    low, high = np.quantile(u, (TAIL, 1 - TAIL))
    if u.min() == u.max():
        return np.full(len(u), 0.5)
    if low == high:  # nearly all the same: only the ranks are left
        return _ranks(u)
    scaled = TAIL + (1 - 2 * TAIL) * (u - low) / (high - low)
    below, above = u < low, u > high
    scaled[below] = TAIL * _ranks(u[below])
    scaled[above] = 1 - TAIL + TAIL * _ranks(u[above])
    return scaled


def _ranks(u: np.ndarray) -> np.ndarray:
    """0 to 1, equal for equal values: the share of distinct values up to each, its own half."""
    distinct, places = np.unique(u, return_inverse=True)
    return (places + 0.5) / max(1, len(distinct))


def untied(scaled: np.ndarray, seed: int) -> np.ndarray:
    """With a little added by lot, too little to change an order: of equals the lower row comes
    first, and the beginning of a pool is not worth more than its end."""
    gaps = np.diff(np.unique(scaled))
    lot = min(LOT, gaps.min() / 2) if len(gaps) else LOT
    return scaled + lot * np.random.default_rng(seed).random(len(scaled))


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; rows of zeros stay."""
    x = np.asarray(x, dtype=np.float32)
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norms > 0, norms, 1)


@dataclass(frozen=True)
class Transform:
    """x -> unit((x - mean) @ matrix); mean float32 [d], matrix float32 [d, d]. None: unit(x)."""

    mean: np.ndarray | None = None
    matrix: np.ndarray | None = None

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x = np.asarray(x, dtype=np.float32)
        if self.mean is None or self.matrix is None:
            return unit(x)
        return unit((x - self.mean) @ self.matrix)


def fit_whitening(embeddings: np.ndarray, seed: int = 0) -> Transform:
    """PCA whitening, fitted on up to 100,000 rows.

    Hidden states of language models lie in a narrow cone: before whitening any two have a
    cosine near 1, and similarity says little.
    """
    rows = np.arange(len(embeddings))
    if len(rows) > SAMPLE:
        # Sorted: the file behind a memory map is then read once, forwards.
        rows = np.sort(np.random.default_rng(seed).choice(len(rows), SAMPLE, replace=False))
    x = np.asarray(embeddings[rows], dtype=np.float64)
    mean = x.mean(axis=0)
    variances, axes = np.linalg.eigh((x - mean).T @ (x - mean) / len(x))
    variances = np.maximum(variances, 0)
    floor = RIDGE * variances.mean()
    if floor == 0:
        return Transform()  # all rows are the same
    matrix = axes / np.sqrt(variances + floor)
    return Transform(mean.astype(np.float32), matrix.astype(np.float32))
