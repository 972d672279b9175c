"""Policies over vectors (embeddings, or gradients of the last layer): all pairs of them.

n candidates of d dimensions; facility location and CRAIG hold n x n similarities.
"""

from __future__ import annotations

import heapq

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.policies.base import Choice, Features, unweighted
from deltaserve.select.scale import unit

# 1.6 GB of similarities in float32.
MAX_DENSE = 20_000
RIDGE = 1e-3
SETTLED = 1e-9


def kcenter(features: Features, k: int, seed: int) -> Choice:
    """Farthest first (Gonzalez 1985; Sener and Savarese 2018): the largest distance of any
    sample to its nearest chosen one is at most twice the least possible."""
    x = _vectors(features)
    row = int(np.random.default_rng(seed).integers(features.count))
    rows = np.empty(k, dtype=np.int64)
    away = np.full(features.count, np.inf)
    for at in range(k):
        rows[at] = row
        away = np.minimum(away, ((x - x[row]) ** 2).sum(axis=1))
        away[row] = -1  # a copy of a chosen sample is still another sample
        row = int(np.argmax(away))
    return unweighted(rows)


def submodular(features: Features, k: int, seed: int) -> Choice:
    """Facility location: the sum over all samples of the cosine to the nearest chosen one."""
    _check_dense(features)
    x = unit(_vectors(features))
    return unweighted(facility_location(np.maximum(x @ x.T, 0), k))


def craig(features: Features, k: int, seed: int) -> Choice:
    """CRAIG (Mirzasoleiman et al. 2020): facility location on distances of gradients. Each
    weighs as many samples as it is nearest to, so that weights sum to n."""
    _check_dense(features)
    x = _vectors(features)
    lengths = (x * x).sum(axis=1)
    squared = np.maximum(lengths[:, None] + lengths - 2 * (x @ x.T), 0)
    near = np.sqrt(squared.max()) - np.sqrt(squared)
    rows = facility_location(near, k)
    # A chosen sample stands for itself, whatever copies of it are chosen as well.
    nearest = near[:, rows].argmax(axis=1)
    nearest[rows] = np.arange(k)
    return Choice(rows, np.bincount(nearest, minlength=k).astype(np.float64))


def gradmatch(features: Features, k: int, seed: int) -> Choice:
    """GradMatch (Killamsetty et al. 2021): orthogonal matching pursuit. Chosen gradients,
    weighted by 0 or more, are to add up to the sum of all; the weights may be 0 for samples
    that can only add to the error."""
    x = _vectors(features)
    target = x.sum(axis=0)
    # Keeps the weights of nearly equal gradients bounded; never 0, or zero gradients divide by it.
    ridge = RIDGE * float((x * x).sum(axis=1).mean()) + np.finfo(np.float64).tiny
    rows, weights = np.empty(0, dtype=np.int64), np.empty(0)
    open_rows = np.ones(features.count, dtype=bool)
    for _ in range(k):
        fit = x @ (target - weights @ x[rows])
        row = int(np.argmax(np.where(open_rows, fit, -np.inf)))
        open_rows[row] = False
        rows = np.append(rows, row)
        chosen = x[rows]
        system = chosen @ chosen.T + ridge * np.eye(len(rows))
        weights = non_negative(system, chosen @ target, np.append(weights, 0.0))
    return Choice(rows, weights)


def facility_location(near: np.ndarray, k: int) -> np.ndarray:
    """The k rows that greedy takes for sum_i max_{j chosen} near[i, j], in its order: int64 [k].

    near: [n, n], 0 or more. Lazily (Minoux 1978): gains only fall, so an old gain is a bound.
    """
    covered = np.zeros(len(near), dtype=near.dtype)
    heap = [(-float(gain), row) for row, gain in enumerate(near.sum(axis=0, dtype=np.float64))]
    heapq.heapify(heap)
    rows: list[int] = []
    while len(rows) < k:
        _, row = heapq.heappop(heap)
        gain = float(np.maximum(near[:, row] - covered, 0).sum(dtype=np.float64))
        if heap and (-gain, row) > heap[0]:
            heapq.heappush(heap, (-gain, row))
            continue
        rows.append(row)
        covered = np.maximum(covered, near[:, row])
    return np.array(rows, dtype=np.int64)


def non_negative(system: np.ndarray, right: np.ndarray, start: np.ndarray) -> np.ndarray:
    """w >= 0 with the least w'Aw/2 - w'b, A positive definite, from ``start`` on.

    Active sets (Lawson and Hanson 1974, ch. 23): a weight joins the free ones while the error
    falls along it, and leaves them where it would turn negative.
    """
    weights = start.copy()
    free = weights > 0
    # Each turn settles one weight; rounding must not make two of them take turns for ever.
    for _ in range(3 * len(weights)):
        slope = right - system @ weights
        joins = int(np.argmax(np.where(free, -np.inf, slope)))
        if free.all() or slope[joins] <= SETTLED * np.abs(right).max():
            break
        free[joins] = True
        while True:
            best = np.zeros_like(weights)
            best[free] = np.linalg.solve(system[np.ix_(free, free)], right[free])
            negative = np.flatnonzero(free & (best <= 0))
            if not len(negative):
                break
            # As far towards the best as all stay positive; those that reach 0 leave.
            steps = weights[negative] / (weights[negative] - best[negative])
            weights += steps.min() * (best - weights)
            free[negative[steps == steps.min()]] = False
            weights[~free] = 0
        weights = best
    return weights


def _vectors(features: Features) -> np.ndarray:
    assert features.vectors is not None
    return np.asarray(features.vectors, dtype=np.float64)


def _check_dense(features: Features) -> None:
    if features.count > MAX_DENSE:
        raise SelectionError(
            f"{features.count:,} samples are too many for all pairs of them (at most "
            f"{MAX_DENSE:,}): presample, or use the pairwise objective"
        )
