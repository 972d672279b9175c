"""Policies that do not look at the model: random, and random with equal shares."""

from __future__ import annotations

import numpy as np

from deltaserve.select.policies.base import Choice, Features, unweighted


def random(features: Features, k: int, seed: int) -> Choice:
    """Uniform, each sample once."""
    return unweighted(np.random.default_rng(seed).permutation(features.count)[:k])


def random_no_replacement(features: Features, k: int, seed: int) -> Choice:
    """Uniform among the samples used least: none comes again before all have come."""
    assert features.used is not None
    order = np.random.default_rng(seed).permutation(features.count)
    return unweighted(order[np.argsort(features.used[order], kind="stable")][:k])


def label_balanced(features: Features, k: int, seed: int) -> Choice:
    """The same number of every label; what a rare label lacks, the others share."""
    assert features.labels is not None
    return _balanced(features.labels, k, seed)


def trigger_balanced(features: Features, k: int, seed: int) -> Choice:
    """The same number of every trigger, so that old data keeps its share."""
    assert features.triggers is not None
    return _balanced(features.triggers, k, seed)


def rs2(features: Features, k: int, seed: int) -> Choice:
    """Repeated random subsets (Okanovic et al. 2024): epoch after epoch through one permutation,
    and then through the next."""
    start, rows = features.epoch * k, np.empty(0, dtype=np.int64)
    while len(rows) < k:
        lap, place = divmod(start + len(rows), features.count)
        order = np.random.default_rng((seed, lap)).permutation(features.count)
        # A subset that crosses into the next permutation must not repeat itself.
        fresh = order[place:] if not len(rows) else order[~np.isin(order, rows)]
        rows = np.concatenate([rows, fresh[: k - len(rows)]])
    return unweighted(rows)


def rs2_with_replacement(features: Features, k: int, seed: int) -> Choice:
    """RS2 with a fresh permutation in every epoch."""
    generator = np.random.default_rng((seed, features.epoch))
    return unweighted(generator.permutation(features.count)[:k])


def equal_shares(sizes: np.ndarray, k: int) -> np.ndarray:
    """How many of each group, int [groups]: sums to k, at most ``sizes``, and as even as that
    allows; where k does not divide, the first groups get one more."""
    levels = np.unique(np.r_[0, sizes])
    # The highest level of water at which all groups together hold no more than k ...
    held = np.minimum(sizes[:, None], levels).sum(axis=0)
    at = int(np.flatnonzero(held <= k)[-1])
    above = np.flatnonzero(sizes > levels[at])
    level, left = int(levels[at]), k - int(held[at])
    # ... then evenly to those that are larger.
    each, rest = divmod(left, len(above)) if len(above) else (0, 0)
    shares = np.minimum(sizes, level + each)
    shares[above[:rest]] += 1
    return shares


def _balanced(groups: np.ndarray, k: int, seed: int) -> Choice:
    _, codes = np.unique(groups, return_inverse=True)
    sizes = np.bincount(codes)
    order = np.random.default_rng(seed).permutation(len(codes))
    # Groups in blocks, each in random order.
    order = order[np.argsort(codes[order], kind="stable")]
    place = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return unweighted(order[place < equal_shares(sizes, k)[codes[order]]])
