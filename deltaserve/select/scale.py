"""Bringing numbers of different origin to one scale: utilities, embeddings.

n samples, d dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deltaserve.errors import SelectionError

# Utilities beyond these quantiles of their source count as the quantile: one absurd value must
# not flatten all others.
LOW, HIGH = 0.01, 0.99
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
    """Each source's utilities on 0 to 1: its 1st percentile becomes 0, its 99th 1.

    utility: float64 [n]; codes: int [n], the source of each. A source whose utilities are all
    the same has no order of its own and gets 0.5.
    """
    scaled = np.empty(len(utility))
    for code in np.unique(codes):
        rows = codes == code
        low, high = np.quantile(utility[rows], (LOW, HIGH))
        if high > low:
            scaled[rows] = np.clip((utility[rows] - low) / (high - low), 0.0, 1.0)
        else:
            scaled[rows] = 0.5
    return scaled


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
