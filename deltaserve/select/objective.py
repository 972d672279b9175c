"""The value of a set: exact in the instance's units, added up over shards."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import SelectionError
from deltaserve.select.compiled import kernel
from deltaserve.select.graph import AnyShard
from deltaserve.select.problem import Instance, Problem
from deltaserve.select.state import CHOSEN, SELECTED, State
from deltaserve.select.steps import cost, inside, worth


@kernel
def _value(
    start: int,
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    weights: NDArray[np.float32],
    status: NDArray[np.uint8],
    utility: NDArray[np.float32],
    alpha: float,
    beta: float,
) -> tuple[np.int64, np.int64]:
    # In two halves: the sum over a large shard does not fit 64 bits.
    high, low = np.int64(0), np.int64(0)
    for i in range(len(indptr) - 1):
        v = start + i
        if not inside(status[v]):
            continue
        value = worth(utility[v], alpha)
        for e in range(indptr[i], indptr[i + 1]):
            w = indices[e]
            # Each undirected edge once, at its lower end.
            if w > v and inside(status[w]):
                value -= cost(weights[e], beta)
        high += value >> 20
        low += value & 0xFFFFF
    return high, low


def shard_value(shard: AnyShard, instance: Instance, status: NDArray[np.uint8]) -> int:
    """This shard's part of f, in the instance's units: its points, and the edges to higher ids."""
    high, low = _value(
        shard.start,
        shard.indptr,
        shard.indices,
        shard.weights,
        status,
        instance.utility,
        instance.alpha,
        instance.beta,
    )
    return (int(high) << 20) + int(low)


def value(shard: AnyShard, state: State) -> int:
    """``shard_value`` as a step, of everything that is in the set."""
    return shard_value(shard, state.instance, state.status)


def objective(problem: Problem, ids: NDArray[Any]) -> float:
    """f of these points together with what was chosen before.

    Raises SelectionError for ids that are out of range.
    """
    size = problem.graph.num_points
    if len(ids) and (ids.min() < 0 or ids.max() >= size):
        raise SelectionError(f"ids must lie between 0 and {size - 1}")
    status = np.zeros(size, np.uint8)
    if problem.chosen is not None:
        status[problem.chosen] = CHOSEN
    status[ids] = SELECTED
    instance = problem.instance
    total = sum(shard_value(shard, instance, status) for shard in problem.graph.shards)
    return total / instance.scale
