"""The similarity graph: undirected, in compressed sparse rows, cut into shards of points.

Both directions of an edge are stored, with the same weight, and neighbours are sorted. A
shard holds the rows of consecutive points; a graph on disk maps a shard's files only while
somebody works on it, so that a graph larger than memory can be streamed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.artifact.staging import StagedDirectory, write_text
from deltaserve.errors import SelectionError
from deltaserve.select import graph_kernels as kernels
from deltaserve.select.graph_build import Edges

Ints = NDArray[Any]
Floats = NDArray[np.float32]

FORMAT = "deltaserve-graph/1"
MANIFEST = "graph.json"


@dataclass(frozen=True, eq=False)
class Shard:
    """Rows of the points start..stop-1.

    indptr: int64 [stop - start + 1], from 0; indices: int32 or int64 ids of neighbours,
    ascending in each row; weights: float32, not negative. The arrays are read-only.
    """

    start: int
    stop: int
    indptr: NDArray[np.int64]
    indices: Ints
    weights: Floats

    def __post_init__(self) -> None:
        for array in (self.indptr, self.indices, self.weights):
            array.flags.writeable = False


@dataclass(frozen=True)
class MappedShard:
    """A shard on disk. Each array is mapped when it is asked for and unmapped when dropped."""

    start: int
    stop: int
    directory: Path
    number: int

    def _map(self, name: str) -> NDArray[Any]:
        return np.asarray(np.load(self.directory / file_name(name, self.number), mmap_mode="r"))

    @property
    def indptr(self) -> NDArray[np.int64]:
        return self._map("indptr")

    @property
    def indices(self) -> Ints:
        return self._map("indices")

    @property
    def weights(self) -> Floats:
        return self._map("weights")


AnyShard = Shard | MappedShard


def file_name(name: str, number: int) -> str:
    return f"{name}-{number:05d}.npy"


class Graph:
    """A symmetric similarity graph. ``path`` is its directory when it is on disk, else None."""

    def __init__(self, shards: Sequence[AnyShard], path: Path | None = None) -> None:
        if not shards:
            raise SelectionError("the graph has no shards: build it from at least one point")
        expected = 0
        for shard in shards:
            if shard.stop <= shard.start:
                raise SelectionError(f"the shard at point {shard.start} is empty: use fewer shards")
            if shard.start != expected:
                raise SelectionError(
                    f"a shard starts at point {shard.start}, but {expected} comes next: "
                    "shards must follow each other without gaps"
                )
            expected = shard.stop
        self.shards: tuple[AnyShard, ...] = tuple(shards)
        self.num_points = expected
        self.path = path

    @classmethod
    def from_edges(
        cls,
        num_points: int,
        rows: Ints,
        cols: Ints,
        weights: NDArray[Any],
        *,
        shards: int = 1,
        path: str | os.PathLike[str] | None = None,
    ) -> Graph:
        """The undirected graph of these edges, each given in one direction or in both.

        An edge given several times gets its largest weight. With ``path`` shards are written
        there one after the other, so that only one of them is in memory at a time.

        Raises SelectionError: self loop, id out of range, negative or non-finite weight,
        more shards than points.
        """
        return cls._build(Edges(num_points, rows, cols, weights), shards, path)

    @classmethod
    def from_neighbours(
        cls,
        neighbours: Ints,
        weights: NDArray[Any],
        *,
        shards: int = 1,
        path: str | os.PathLike[str] | None = None,
    ) -> Graph:
        """As ``from_edges``, from lists of neighbours [points, neighbours]; id -1 means none."""
        if neighbours.ndim != 2 or neighbours.shape != weights.shape:
            raise SelectionError(
                f"neighbours {neighbours.shape} and weights {weights.shape} must both be "
                "[points, neighbours]"
            )
        rows = np.empty(0, np.int64)
        edges = Edges(len(neighbours), rows, neighbours.reshape(-1), weights.reshape(-1))
        return cls._build(edges, shards, path)

    @classmethod
    def _build(cls, edges: Edges, shards: int, path: str | os.PathLike[str] | None) -> Graph:
        edges.check()
        bounds = shard_bounds(edges.num_points, shards)
        if path is None:
            return cls([Shard(a, b, *edges.of_rows(a, b)) for a, b in bounds])
        with StagedDirectory(path) as staged:
            for number, (start, stop) in enumerate(bounds):
                shard = Shard(start, stop, *edges.of_rows(start, stop))
                save_shard(staged.path, number, shard)
            write_manifest(staged.path, bounds)
            staged.commit()
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Graph:
        """A graph that ``save`` wrote. Raises SelectionError when it is not one."""
        directory = Path(path)
        try:
            manifest = json.loads((directory / MANIFEST).read_text())
            bounds = [(int(start), int(stop)) for start, stop in manifest["shards"]]
            found = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError):
            raise SelectionError(
                f"{directory} holds no graph: {MANIFEST} is missing or damaged"
            ) from None
        if found != FORMAT:
            raise SelectionError(f"{directory} has the format {found!r}; this reads {FORMAT!r}")
        shards = [MappedShard(a, b, directory, i) for i, (a, b) in enumerate(bounds)]
        for shard in shards:
            _check_files(shard)
        return cls(shards, directory)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the graph to a new directory. Raises OutputExistsError if there is one."""
        with StagedDirectory(path) as staged:
            for number, shard in enumerate(self.shards):
                save_shard(staged.path, number, shard)
            write_manifest(staged.path, [(s.start, s.stop) for s in self.shards])
            staged.commit()

    def merged(self) -> AnyShard:
        """One shard with every row; a copy in memory unless the graph is one shard already."""
        if len(self.shards) == 1:
            return self.shards[0]
        offsets = np.cumsum([0] + [int(s.indptr[-1]) for s in self.shards])
        starts = (s.indptr[:-1] + o for s, o in zip(self.shards, offsets[:-1], strict=True))
        return Shard(
            0,
            self.num_points,
            np.concatenate([*starts, offsets[-1:]]),
            np.concatenate([s.indices for s in self.shards]),
            np.concatenate([s.weights for s in self.shards]),
        )

    def resharded(self, shards: int) -> Graph:
        """The same graph in memory, cut anew into this many shards."""
        whole = self.merged()
        indptr, indices, weights = whole.indptr, whole.indices, whole.weights
        parts = []
        for start, stop in shard_bounds(self.num_points, shards):
            first, last = indptr[start], indptr[stop]
            local = indptr[start : stop + 1] - first
            parts.append(Shard(start, stop, local, indices[first:last], weights[first:last]))
        return Graph(parts)

    @cached_property
    def num_edges(self) -> int:
        """Undirected edges."""
        return sum(len(shard.indices) for shard in self.shards) // 2

    @cached_property
    def max_weight(self) -> float:
        return max(float(np.max(shard.weights, initial=0.0)) for shard in self.shards)

    @cached_property
    def max_degree(self) -> int:
        return max(int(np.diff(shard.indptr).max()) for shard in self.shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of degrees, neighbours and weights; the same however the graph is cut."""
        hashes = [hashlib.sha256() for _ in range(3)]
        for shard in self.shards:
            degrees = np.diff(shard.indptr)
            for digest, array in zip(hashes, (degrees, shard.indices, shard.weights), strict=True):
                digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        whole = hashlib.sha256(str(self.num_points).encode())
        for digest in hashes:
            whole.update(digest.digest())
        return whole.hexdigest()

    def validate(self) -> None:
        """Raises SelectionError: rows not ascending, self loop, id out of range, negative or
        non-finite weight, or an edge whose two directions do not agree."""
        sums = np.zeros(self.num_points, np.uint64)
        for shard in self.shards:
            indptr, indices, weights = shard.indptr, shard.indices, shard.weights
            if indptr[0] != 0 or indptr[-1] != len(indices) or len(indices) != len(weights):
                raise SelectionError(
                    f"the shard at point {shard.start} is damaged: its row pointers do not fit "
                    f"its {len(indices)} neighbours and {len(weights)} weights"
                )
            code, v, w = kernels.check_rows(
                shard.start, indptr, indices, weights.view(np.uint32), weights, sums
            )
            if code:
                raise SelectionError(kernels.PROBLEMS[code].format(v=v, w=w))
        # Both directions of an edge add and subtract the same word at its lower end.
        uneven = np.flatnonzero(sums)
        if len(uneven):
            raise SelectionError(
                f"the graph is not symmetric: an edge of point {uneven[0]} lacks its other "
                "direction or has another weight there; build it by Graph.from_edges"
            )


def shard_bounds(num_points: int, shards: int) -> list[tuple[int, int]]:
    """Consecutive ranges of points, equal up to one. Raises SelectionError if one is empty."""
    if shards < 1:
        raise SelectionError(f"the number of shards is {shards}, but must be at least 1")
    if shards > num_points:
        raise SelectionError(
            f"{shards} shards for {num_points} points leave some empty: use fewer shards"
        )
    return list(pairwise(num_points * i // shards for i in range(shards + 1)))


def save_shard(directory: Path, number: int, shard: AnyShard) -> None:
    for name in ("indptr", "indices", "weights"):
        np.save(directory / file_name(name, number), getattr(shard, name))


def write_manifest(directory: Path, bounds: Iterable[tuple[int, int]]) -> None:
    content = {"format": FORMAT, "shards": [list(pair) for pair in bounds]}
    write_text(directory / MANIFEST, json.dumps(content) + "\n")


def _check_files(shard: MappedShard) -> None:
    try:
        indptr, indices, weights = shard.indptr, shard.indices, shard.weights
    except (OSError, ValueError) as error:
        raise SelectionError(f"{shard.directory} is damaged: {error}") from None
    kinds = (indptr.dtype, weights.dtype) == (np.int64, np.float32)
    if not kinds or indices.dtype not in (np.int32, np.int64):
        raise SelectionError(f"{shard.directory} is damaged: an array has the wrong type")
    if len(indptr) != shard.stop - shard.start + 1 or len(indices) != len(weights):
        raise SelectionError(f"{shard.directory} is damaged: the arrays of a shard do not fit")
