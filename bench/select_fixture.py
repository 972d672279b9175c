"""The pool that selection quality is measured on: 50,000 points that look like CIFAR features."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from deltaserve.select.budgets import Budget
from deltaserve.select.graph import Graph
from deltaserve.select.problem import Problem

POINTS, WIDTH, CLASSES, NEIGHBOURS = 50_000, 64, 100, 10


class Fixture:
    """100 Gaussian classes behind a ReLU; utility is the margin of a linear classifier, less
    its minimum; the graph is the exact cosine 10-NN, in both directions."""

    def __init__(self, seed: int, points: int = POINTS) -> None:
        rng = np.random.default_rng(seed)
        means = rng.normal(size=(CLASSES, WIDTH)).astype(np.float32)
        labels = rng.integers(0, CLASSES, points)
        noise = rng.normal(size=(points, WIDTH)).astype(np.float32)
        features = np.maximum(means[labels] + np.float32(1.1) * noise, 0)
        self.utility = _margin(0.35 * features @ np.maximum(means, 0).T)
        neighbours, weights = _cosine_neighbours(features)
        self.graph = Graph.from_neighbours(neighbours, weights)
        self.seed = seed

    def problem(self, share: float, alpha: float = 0.9) -> Problem:
        budget = Budget(round(share * self.graph.num_points))
        return Problem(self.graph, self.utility, budget, alpha)


def _margin(logits: NDArray[Any]) -> NDArray[np.float32]:
    logits = logits - logits.max(axis=1, keepdims=True)
    share = np.exp(logits)
    share /= share.sum(axis=1, keepdims=True)
    top = np.partition(share, -2, axis=1)
    margin = 1 - (top[:, -1] - top[:, -2])
    return np.asarray(margin - margin.min(), np.float32)


def _cosine_neighbours(features: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    weights, neighbours = index.search(unit, NEIGHBOURS + 1)
    # A point is its own nearest neighbour, or one of several equals.
    own = neighbours == np.arange(len(unit))[:, None]
    neighbours[own] = -1
    return neighbours, np.clip(weights, 0, 1)
