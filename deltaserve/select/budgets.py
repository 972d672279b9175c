"""How much may be selected: so many points, so many of each group, so many tokens."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import SelectionError

UNLIMITED = np.iinfo(np.int64).max


@dataclass(frozen=True, eq=False)
class Budget:
    """What a selection may take; limits given together all hold.

    ``Budget(k)`` takes exactly k points. ``Budget(groups=labels, counts={"a": 3, "b": 2})``
    takes exactly so many of each group (of labels, sources, tenants); with a smaller ``k``
    the counts are upper limits. A label without a count gives nothing. ``Budget(tokens=...,
    lengths=...)`` takes what fits: the best gain for each token comes first (the cost-benefit
    rule of Leskovec et al., KDD 2007), or the best gain with ``per_token=False``, and what
    does not fit any more is passed over.
    """

    k: int | None = None
    groups: NDArray[Any] | None = None
    """[points] labels of any type."""
    counts: Mapping[Hashable, int] | None = None
    tokens: int | None = None
    lengths: NDArray[Any] | None = None
    """[points] tokens of each point, at least 1."""
    per_token: bool = True


@dataclass(frozen=True, eq=False)
class Limits:
    """A budget made ready for the solvers. Arrays of a limit that is not set are empty."""

    k: int
    group: NDArray[np.int32]
    """[points] number of the group; the last number is for what has no count."""
    caps: NDArray[np.int64]
    """[groups] most points of each; one entry, k, without groups."""
    exact: bool
    """Whether every selection takes exactly ``caps``."""
    length: NDArray[np.int64]
    tokens: int
    per_token: bool


def make_limits(budget: Budget, num_points: int, chosen: NDArray[np.bool_] | None) -> Limits:
    """Raises SelectionError when the pool cannot meet the budget or the budget is unclear."""
    free = np.ones(num_points, bool) if chosen is None else ~chosen
    available = int(np.count_nonzero(free))
    group, caps, names = _groups(budget, num_points)
    length = _lengths(budget, num_points)
    k = budget.k
    if k is None:
        if budget.counts is None and budget.tokens is None:
            raise SelectionError("the budget is empty: give k, counts of groups, or tokens")
        k = available if budget.counts is None else int(caps.sum())
    if k < 1:
        raise SelectionError(f"k is {k}, but must be at least 1")
    if k > available and budget.tokens is None:
        raise SelectionError(
            f"k is {k}, but the pool has only {available} points"
            + (" that are not chosen yet" if available < num_points else "")
        )
    if len(names) and budget.tokens is None:
        _check_groups(k, group, caps, names, free)
    if budget.tokens is not None and not np.any(length[free] <= budget.tokens):
        raise SelectionError(
            f"the budget is {budget.tokens} tokens, but no point of the pool is that short"
        )
    return Limits(
        k=k,
        group=group,
        caps=caps if len(names) else np.array([k], np.int64),
        exact=budget.tokens is None and (not len(names) or int(caps.sum()) == k),
        length=length,
        tokens=UNLIMITED if budget.tokens is None else int(budget.tokens),
        per_token=budget.per_token,
    )


def _groups(
    budget: Budget, num_points: int
) -> tuple[NDArray[np.int32], NDArray[np.int64], tuple[str, ...]]:
    if (budget.groups is None) != (budget.counts is None):
        raise SelectionError("a budget by groups needs both the groups and their counts")
    if budget.groups is None or budget.counts is None:
        return np.empty(0, np.int32), np.empty(0, np.int64), ()
    labels, code = np.unique(np.asarray(budget.groups), return_inverse=True)
    if code.shape != (num_points,):
        raise SelectionError(f"{code.size} group labels for {num_points} points: give one each")
    known = {label: number for number, label in enumerate(labels.tolist())}
    unknown = [name for name in budget.counts if name not in known]
    if unknown:
        raise SelectionError(f"no point of the pool is in the group {unknown[0]!r}")
    if any(count < 0 for count in budget.counts.values()):
        raise SelectionError("the count of a group is negative")
    caps = np.array([int(budget.counts.get(label, 0)) for label in known], np.int64)
    return code.astype(np.int32), caps, tuple(str(label) for label in known)


def _lengths(budget: Budget, num_points: int) -> NDArray[np.int64]:
    if (budget.tokens is None) != (budget.lengths is None):
        raise SelectionError("a budget of tokens needs both the tokens and the points' lengths")
    if budget.lengths is None:
        return np.empty(0, np.int64)
    length = np.ascontiguousarray(budget.lengths, np.int64)
    if length.shape != (num_points,):
        raise SelectionError(f"{length.size} lengths for {num_points} points: give one each")
    if length.min() < 1:
        raise SelectionError(f"point {int(length.argmin())} has length {length.min()}: at least 1")
    return length


def _check_groups(
    k: int,
    group: NDArray[np.int32],
    caps: NDArray[np.int64],
    names: tuple[str, ...],
    free: NDArray[np.bool_],
) -> None:
    if k > caps.sum():
        raise SelectionError(f"k is {k}, but the counts of the groups add up to {caps.sum()}")
    sizes = np.bincount(group[free], minlength=len(caps))
    if np.minimum(sizes, caps).sum() < k:
        short = [
            f"{name!r} has {size} of {cap}"
            for name, size, cap in zip(names, sizes, caps, strict=True)
            if size < cap
        ]
        raise SelectionError(f"the groups cannot meet the budget of {k}: {', '.join(short[:5])}")
