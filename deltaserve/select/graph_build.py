"""Making the undirected graph of a list of edges, one shard at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import SelectionError
from deltaserve.select import graph_kernels as kernels


@dataclass(frozen=True)
class Edges:
    """Edges in one direction or both; without rows, lists of neighbours of equal length."""

    num_points: int
    rows: NDArray[Any]
    cols: NDArray[Any]
    weights: NDArray[Any]

    @property
    def width(self) -> int:
        """Neighbours of each point when there are no rows, else 0."""
        return 0 if len(self.rows) else len(self.cols) // self.num_points

    def check(self) -> None:
        if self.num_points < 1:
            raise SelectionError("the pool is empty: a graph needs at least one point")
        if len(self.cols) != len(self.weights) or len(self.rows) not in (0, len(self.cols)):
            raise SelectionError(
                f"{len(self.rows)} rows, {len(self.cols)} columns and {len(self.weights)} "
                "weights: an edge needs one of each"
            )
        code, v, w = kernels.check_edges(
            self.num_points, self.rows, self.cols, self.weights, self.width
        )
        if code:
            raise SelectionError(kernels.PROBLEMS[code].format(v=v, w=w))

    def of_rows(
        self, start: int, stop: int
    ) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[np.float32]]:
        """indptr, indices, weights of the points start..stop-1, both directions, merged."""
        indptr = kernels.count_edges(start, stop, self.rows, self.cols, self.width)
        indices = np.empty(indptr[-1], index_type(self.num_points))
        values = np.empty(indptr[-1], np.float32)
        kernels.fill_edges(
            start, stop, self.rows, self.cols, self.weights, self.width, indptr, indices, values
        )
        indptr = kernels.sort_rows(indptr, indices, values)
        kept = int(indptr[-1])
        if kept < len(indices):
            indices, values = indices[:kept].copy(), values[:kept].copy()
        return indptr, indices, values


def index_type(num_points: int) -> type[np.int32] | type[np.int64]:
    """The type of ids: 32 bits while they suffice."""
    return cast(Any, np.int32 if num_points <= np.iinfo(np.int32).max else np.int64)
