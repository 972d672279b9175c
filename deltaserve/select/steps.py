"""Steps that several solvers share; the rules for a step are in ``state.writes``."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.select.compiled import kernel
from deltaserve.select.graph import AnyShard
from deltaserve.select.state import (
    CHOSEN,
    FRESH,
    INCLUDED,
    OUT,
    SELECTED,
    UNDECIDED,
    State,
    writes,
)

EVERY = np.empty(0, np.int64)


@kernel
def inside(status: int) -> bool:
    """Whether a point of this status is in the set."""
    return SELECTED <= status <= INCLUDED


@kernel
def worth(utility: float, alpha: float) -> np.int64:
    """A point's own term of the objective, in units of the instance."""
    return np.int64(np.rint(np.float64(utility) * alpha))


@kernel
def cost(weight: float, beta: float) -> np.int64:
    """An edge's term of the objective, in units of the instance."""
    return np.int64(np.rint(np.float64(weight) * beta))


@kernel
def _refresh(
    start: int,
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    weights: NDArray[np.float32],
    status: NDArray[np.uint8],
    gain: NDArray[np.int64],
    utility: NDArray[np.float32],
    divisor: NDArray[np.int64],
    alpha: float,
    beta: float,
    group: NDArray[np.int32],
    keys: NDArray[np.int64],
) -> None:
    for i in range(len(indptr) - 1):
        v = start + i
        if status[v] == FRESH:
            status[v] = SELECTED
        elif status[v] == UNDECIDED:
            if len(keys) and gain[v] < keys[group[v] if len(group) else 0]:
                continue
            value = worth(utility[v], alpha)
            for e in range(indptr[i], indptr[i + 1]):
                other = status[indices[e]]
                # FRESH neighbours are turned into SELECTED ones by this very phase.
                if other == FRESH or inside(other):
                    value -= cost(weights[e], beta)
            gain[v] = value // divisor[v] if len(divisor) else value


@writes("status", "gain")
def refresh(shard: AnyShard, state: State, keys: NDArray[np.int64], divide: bool = True) -> None:
    """Settle what the last sweep took; recompute the gains that reach their group's key.

    keys: [groups], or ``EVERY``.
    """
    i = state.instance
    _refresh(
        shard.start,
        shard.indptr,
        shard.indices,
        shard.weights,
        state.status,
        state.gain,
        i.utility,
        i.divisor if divide else i.divisor[:0],
        i.alpha,
        i.beta,
        i.group,
        keys,
    )


@writes("gain")
def begin(shard: AnyShard, state: State) -> None:
    """Set undecided gains to the points' own worth: an upper bound, without reading edges."""
    i, rows = state.instance, slice(shard.start, shard.stop)
    own = np.rint(i.utility[rows].astype(np.float64) * i.alpha).astype(np.int64)
    if len(i.divisor):
        own //= i.divisor[rows]
    undecided = state.status[rows] == UNDECIDED
    np.copyto(state.gain[rows], own, where=undecided)


@kernel
def _usage(
    status: NDArray[np.uint8],
    group: NDArray[np.int32],
    length: NDArray[np.int64],
    num_groups: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    taken = np.zeros(num_groups, np.int64)
    open_ = np.zeros(num_groups, np.int64)
    tokens = 0
    for i in range(len(status)):
        g = group[i] if len(group) else 0
        if status[i] == UNDECIDED:
            open_[g] += 1
        elif status[i] == SELECTED or status[i] == INCLUDED:
            taken[g] += 1
            tokens += length[i] if len(length) else 0
    return taken, open_, tokens


def usage(
    shard: AnyShard, state: State, num_groups: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Points taken and undecided in each group, and tokens taken."""
    i, rows = state.instance, slice(shard.start, shard.stop)
    return _usage(state.status[rows], i.group[rows], i.length[rows], num_groups)


@writes("status")
def retire(shard: AnyShard, state: State, full: NDArray[np.bool_], longest: int) -> None:
    """Put out what can no longer be taken: members of full groups, and what is too long."""
    rows, length = slice(shard.start, shard.stop), state.instance.length
    status, group = state.status[rows], state.instance.group[rows]
    closed = full[group] if len(group) else np.full(len(status), full[0])
    if len(length):
        closed = closed | (length[rows] > longest)
    status[closed & (status == UNDECIDED)] = OUT


@kernel
def _collect(
    start: int,
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    weights: NDArray[np.float32],
    status: NDArray[np.uint8],
    gain: NDArray[np.int64],
    utility: NDArray[np.float32],
    alpha: float,
    beta: float,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    size = 0
    for i in range(len(indptr) - 1):
        size += status[start + i] == SELECTED or status[start + i] == INCLUDED
    ids, keys = np.empty(size, np.int64), np.empty(size, np.int64)
    gains, bounded = np.empty(size, np.int64), np.empty(size, np.bool_)
    n = 0
    for i in range(len(indptr) - 1):
        v = start + i
        if status[v] != SELECTED and status[v] != INCLUDED:
            continue
        included = status[v] == INCLUDED
        own = worth(utility[v], alpha)
        key = own if included else gain[v]
        value = own
        for e in range(indptr[i], indptr[i + 1]):
            w = indices[e]
            before = status[w] == CHOSEN or (status[w] == INCLUDED and not included)
            if status[w] == status[v]:
                other = worth(utility[w], alpha) if included else gain[w]
                before = other > key or (other == key and w < v)
            if before:
                value -= cost(weights[e], beta)
        ids[n], keys[n], gains[n], bounded[n] = v, key, value, included
        n += 1
    return ids, keys, gains, bounded


def collect(shard: AnyShard, state: State) -> tuple[NDArray[Any], ...]:
    """ids, keys of their order, gains in that order, and whether bounding included them.

    First come the points that bounding included, by utility; then those of the solver, by
    the gain at which it took them; lower ids first among equals.
    """
    i = state.instance
    return _collect(
        shard.start,
        shard.indptr,
        shard.indices,
        shard.weights,
        state.status,
        state.gain,
        i.utility,
        i.alpha,
        i.beta,
    )
