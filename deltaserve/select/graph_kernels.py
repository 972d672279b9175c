"""Compiled loops over rows and edges: checking a graph, and building one from edges."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.select.compiled import kernel
from deltaserve.select.random import mix

OK, RANGE, LOOP, WEIGHT, ORDER = range(5)
PROBLEMS = {
    RANGE: "point {v} has the neighbour {w}, which does not exist: ids run from 0 to points - 1",
    LOOP: "point {v} is its own neighbour: leave self loops out",
    WEIGHT: "the weight between points {v} and {w} is negative or not finite: "
    "similarities must be 0 or more",
    ORDER: "the neighbours of point {v} are not ascending at {w}: each may be listed once",
}


@kernel
def check_rows(
    start: int,
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    bits: NDArray[np.uint32],
    weights: NDArray[np.float32],
    sums: NDArray[np.uint64],
) -> tuple[int, Any, Any]:
    """First problem as (code, point, neighbour).

    sums [points]: at the lower end of each edge, the hash of the edge and its weight is added
    for one direction and subtracted for the other; all are 0 if the graph is symmetric.
    """
    num_points = len(sums)
    for i in range(len(indptr) - 1):
        v = start + i
        last = np.int64(-1)
        for e in range(indptr[i], indptr[i + 1]):
            w = np.int64(indices[e])
            if w < 0 or w >= num_points:
                return RANGE, v, w
            if w == v:
                return LOOP, v, w
            if w <= last:
                return ORDER, v, w
            if not (weights[e] >= 0.0 and weights[e] < np.inf):
                return WEIGHT, v, w
            last = w
            if v < w:
                sums[v] += mix(mix(np.uint64(w)) ^ np.uint64(bits[e]))
            else:
                sums[w] -= mix(mix(np.uint64(v)) ^ np.uint64(bits[e]))
    return OK, 0, 0


@kernel
def check_edges(
    num_points: int,
    rows: NDArray[Any],
    cols: NDArray[Any],
    weights: NDArray[Any],
    width: int,
) -> tuple[int, Any, Any]:
    """First problem of a list of edges as (code, row, column); see ``count_edges``."""
    for e in range(len(cols)):
        v = np.int64(rows[e]) if width == 0 else e // width
        w = np.int64(cols[e])
        if width and w == -1:
            continue
        if v < 0 or v >= num_points:
            return RANGE, w, v
        if w < 0 or w >= num_points:
            return RANGE, v, w
        if v == w:
            return LOOP, v, w
        if not (weights[e] >= 0.0 and weights[e] < np.inf):
            return WEIGHT, v, w
    return OK, 0, 0


@kernel
def count_edges(
    start: int, stop: int, rows: NDArray[Any], cols: NDArray[Any], width: int
) -> NDArray[np.int64]:
    """Row pointers [stop - start + 1] of both directions of all edges that touch the shard.

    With width > 0 the edges are lists of neighbours: row e // width, column -1 for none.
    """
    indptr = np.zeros(stop - start + 1, np.int64)
    for e in range(len(cols)):
        v = np.int64(rows[e]) if width == 0 else e // width
        w = np.int64(cols[e])
        if w < 0:
            continue
        if start <= v < stop:
            indptr[v - start + 1] += 1
        if start <= w < stop:
            indptr[w - start + 1] += 1
    return np.cumsum(indptr)


@kernel
def fill_edges(
    start: int,
    stop: int,
    rows: NDArray[Any],
    cols: NDArray[Any],
    weights: NDArray[Any],
    width: int,
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    values: NDArray[np.float32],
) -> None:
    """Put both directions of each edge into its rows, in the order given."""
    place = indptr[:-1].copy()
    for e in range(len(cols)):
        v = np.int64(rows[e]) if width == 0 else e // width
        w = np.int64(cols[e])
        if w < 0:
            continue
        if start <= v < stop:
            at = place[v - start]
            indices[at], values[at] = w, weights[e]
            place[v - start] += 1
        if start <= w < stop:
            at = place[w - start]
            indices[at], values[at] = v, weights[e]
            place[w - start] += 1


@kernel
def sort_rows(
    indptr: NDArray[np.int64], indices: NDArray[Any], values: NDArray[np.float32]
) -> NDArray[np.int64]:
    """Sort each row and merge what is listed several times (largest weight), in place.

    Returns the new row pointers; what lies beyond the last is to be cut off.
    """
    merged = np.zeros(len(indptr), np.int64)
    out = 0
    for i in range(len(indptr) - 1):
        first, last = indptr[i], indptr[i + 1]
        order = np.argsort(indices[first:last])
        row, value = indices[first:last][order], values[first:last][order]
        begin = out
        for j in range(len(row)):
            if out > begin and indices[out - 1] == row[j]:
                values[out - 1] = max(values[out - 1], value[j])
            else:
                indices[out], values[out] = row[j], value[j]
                out += 1
        merged[i + 1] = out
    return merged
