"""Policies that order samples by one number, or draw them by it."""

from __future__ import annotations

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.policies.base import Choice, Features, Rule, unweighted


def highest(name: str) -> Rule:
    """The k samples of highest score; of equals the first."""

    def rule(features: Features, k: int, seed: int) -> Choice:
        return unweighted(top(features.scores[name], k))

    return rule


def drawn(name: str) -> Rule:
    """k samples without replacement, with probability proportional to the score.

    Each weighs 1 / (n p), so that the weighted gradient estimates that of all samples
    (Katharopoulos and Fleuret 2018).
    """

    def rule(features: Features, k: int, seed: int) -> Choice:
        scores = features.scores[name]
        if scores.min() < 0:
            raise SelectionError(f"cannot draw by {name}: the lowest is {scores.min()}, below 0")
        # Samples of score 0 may be needed to fill the budget; they come last.
        floor = max(scores.max(), 1.0) * 1e-9
        share = np.maximum(scores, floor) / np.maximum(scores, floor).sum()
        # The k highest of log p + Gumbel noise are such a draw (Efraimidis and Spirakis 2006).
        keys = np.log(share) + np.random.default_rng(seed).gumbel(size=features.count)
        rows = top(keys, k)
        return Choice(rows, 1 / (features.count * share[rows]))

    return rule


def rholoss(features: Features, k: int, seed: int) -> Choice:
    """Highest loss beyond that of a reference model (RHO-loss, Mindermann et al. 2022)."""
    return unweighted(top(features.scores["loss"] - features.scores["reference_loss"], k))


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """The rows of the k highest, best first, the lower row first among equals."""
    return np.argsort(-scores, kind="stable")[:k]
