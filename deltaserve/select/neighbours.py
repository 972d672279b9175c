"""The neighbour graph: the most similar samples of every sample, by faiss.

n samples, d dimensions, k neighbours. Below FLAT_BELOW samples every pair is compared; above, an
inverted file (IVF) searches the cells nearest to each sample, as many as it takes to find what
comparing every pair finds for a sample of the rows. The recall on that sample is reported.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.extras import load_extra
from deltaserve.select.graph import Graph
from deltaserve.select.pool import Progress, no_progress
from deltaserve.select.scale import Transform

FLAT_BELOW = 50_000
BATCH = 16_384
# faiss's own advice is 39 to 256 training points for a cell.
TRAIN_PER_CELL = 64
RECALL_SAMPLE = 1000
PROBES = 16
# Beyond, an inverted file costs nearly as much as comparing every pair.
MAX_PROBES = 64
# Similarities this close are ties, which no order can tell apart.
TIE = 1e-5


@dataclass(frozen=True)
class KnnOptions:
    """How neighbours are found.

    neighbours: k. probes: cells searched for each sample; None: 16, doubled up to 64 until the
    recall is ``min_recall``. memory_bytes: above this the vectors
    of the index lie on the disk. index: "auto", "flat" or "ivf". min_similarity: edges below it
    are left out; cosines of 0 or less always are, since the objective only penalises likeness.
    """

    neighbours: int = 10
    probes: int | None = None
    min_recall: float = 0.95
    memory_bytes: int = 4 << 30
    index: str = "auto"
    min_similarity: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.neighbours < 1 or (self.probes is not None and self.probes < 1):
            raise SelectionError("the graph needs at least 1 neighbour and 1 probe")
        if self.index not in ("auto", "flat", "ivf"):
            raise SelectionError(f"no index {self.index!r}: choose auto, flat or ivf")
        if not 0 <= self.min_similarity < 1:
            raise SelectionError(f"min_similarity must lie in 0 to 1, not {self.min_similarity}")


@dataclass(frozen=True)
class Neighbours:
    """ids int64 [n, k], -1 where fewer were found; similarities float32 [n, k], descending.
    recall: share of the true neighbours found, on ``checked`` rows. index: what searched."""

    ids: np.ndarray
    similarities: np.ndarray
    recall: float
    checked: int
    index: str


def find_neighbours(
    embeddings: np.ndarray,
    options: KnnOptions | None = None,
    transform: Transform | None = None,
    *,
    progress: Progress = no_progress,
) -> Neighbours:
    """The k rows of highest cosine to each row, itself left out.

    embeddings: [n, d], may be a memory map: it is read in blocks and each block passes through
    ``transform`` (to unit length by default).
    """
    options, transform = options or KnnOptions(), transform or Transform()
    count = len(embeddings)
    k = min(options.neighbours, count - 1)
    if k == 0:
        return Neighbours(
            np.empty((count, 0), np.int64), np.empty((count, 0), np.float32), 1, 0, ""
        )
    with tempfile.TemporaryDirectory(prefix="deltaserve-knn-") as folder:
        index, name = _index(embeddings, transform, options, Path(folder), progress)
        sample = _exact_sample(embeddings, transform, k, options.seed)
        if name != "flat":
            _set_probes(index, sample, options)
            name += f", {index.nprobe} probed"
        ids = np.empty((count, k), dtype=np.int64)
        similarities = np.empty((count, k), dtype=np.float32)
        for start, x in _blocks(embeddings, transform):
            found, near = index.search(x, k + 1)
            rows = slice(start, start + len(x))
            ids[rows], similarities[rows] = _without_self(
                np.arange(start, start + len(x)), near, found
            )
            progress("neighbours", start + len(x), count)
    recall = sample.recall(similarities[sample.rows])
    return Neighbours(ids, similarities, recall, len(sample.rows), name)


def neighbour_graph(
    found: Neighbours, min_similarity: float = 0.0, *, shards: int = 1, path: Path | None = None
) -> Graph:
    """The union-symmetrised graph: an edge where either of two is a neighbour of the other.

    With ``path`` it is written there shard by shard.
    """
    keep = (found.similarities > 0) & (found.similarities >= min_similarity)
    ids = np.where(keep, found.ids, -1)
    # Rounding can bring the cosine of equal vectors above 1.
    weights = np.minimum(found.similarities, 1.0)
    return Graph.from_neighbours(ids, weights, shards=shards, path=path)


def _index(
    embeddings: np.ndarray,
    transform: Transform,
    options: KnnOptions,
    folder: Path,
    progress: Progress,
) -> tuple[Any, str]:
    faiss = load_extra("faiss")
    count = len(embeddings)
    dims = transform(embeddings[:1]).shape[1]
    if options.index == "flat" or (options.index == "auto" and count < FLAT_BELOW):
        index = faiss.IndexFlatIP(dims)
        for _, x in _blocks(embeddings, transform):
            index.add(x)
        return index, "flat"
    cells = max(1, min(round(4 * count**0.5), count // 4))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dims), dims, cells, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = options.seed + 1  # faiss reads 0 as its own default
    index.cp.min_points_per_centroid = 1  # small pools are asked for in tests; no warning
    progress("clustering", 0, 1)
    index.train(_training_rows(embeddings, transform, cells, options.seed))
    progress("clustering", 1, 1)
    name = f"ivf, {cells} cells"
    if 4 * count * dims <= options.memory_bytes:
        for start, x in _blocks(embeddings, transform):
            index.add(x)
            progress("indexing", start + len(x), count)
        return index, name
    return _on_disk(index, embeddings, transform, options, folder, progress), f"{name}, on disk"


def _on_disk(
    index: Any,
    embeddings: np.ndarray,
    transform: Transform,
    options: KnnOptions,
    folder: Path,
    progress: Progress,
) -> Any:
    """The trained index with its vectors in files: filled in pieces that fit the memory, then
    merged into one memory-mapped inverted file."""
    faiss = load_extra("faiss")
    merge_ondisk = load_extra("faiss.contrib.ondisk").merge_ondisk
    faiss.write_index(index, str(folder / "empty"))
    limit = max(BATCH, options.memory_bytes // (8 * index.d))
    pieces: list[str] = []
    for start, x in _blocks(embeddings, transform):
        # Sample ids, not the piece's own: the merged lists then read as if filled in one go.
        index.add_with_ids(x, np.arange(start, start + len(x)))
        progress("indexing", start + len(x), len(embeddings))
        if index.ntotal + BATCH > limit or start + len(x) == len(embeddings):
            pieces.append(str(folder / f"piece-{len(pieces)}"))
            faiss.write_index(index, pieces[-1])
            index.reset()
    merged = faiss.read_index(str(folder / "empty"))
    with _stdout_closed():
        merge_ondisk(merged, pieces, str(folder / "lists"))
    return merged


@contextmanager
def _stdout_closed() -> Iterator[None]:
    """Without what faiss prints from C++ on the standard output, which belongs to results."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _training_rows(
    embeddings: np.ndarray, transform: Transform, cells: int, seed: int
) -> np.ndarray:
    count = len(embeddings)
    chosen = np.arange(count)
    if count > cells * TRAIN_PER_CELL:
        generator = np.random.default_rng(seed)
        chosen = np.sort(generator.choice(count, cells * TRAIN_PER_CELL, replace=False))
    return transform(embeddings[chosen])


def _blocks(embeddings: np.ndarray, transform: Transform) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(embeddings), BATCH):
        yield start, transform(embeddings[start : start + BATCH])


def _without_self(
    rows: np.ndarray, near: np.ndarray, similarities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """[b, k + 1] -> [b, k]: without the row itself, or without the last where it was not found
    (more than k equal to it)."""
    own = near == rows[:, None]
    own[~own.any(axis=1), -1] = True
    shape = (len(near), near.shape[1] - 1)
    return near[~own].reshape(shape), similarities[~own].reshape(shape)


@dataclass(frozen=True)
class _Sample:
    """Rows whose neighbours are known: queries [m, d], best similarities [m, k], descending."""

    rows: np.ndarray
    queries: np.ndarray
    best: np.ndarray

    def recall(self, similarities: np.ndarray) -> float:
        """The share of true neighbours among those found, [m, k].

        One counts as true if it is as similar as the k-th best: with duplicates the best k are
        not unique. Below a cosine of 0 there is nothing to find: such edges are never used.
        """
        wanted = self.best > 0
        hit = (similarities >= self.best[:, -1:] - TIE) & wanted
        return float(hit.sum() / max(1, wanted.sum()))


def _exact_sample(embeddings: np.ndarray, transform: Transform, k: int, seed: int) -> _Sample:
    """Up to 1,000 random rows against all."""
    faiss = load_extra("faiss")
    count = len(embeddings)
    generator = np.random.default_rng(seed)
    rows = np.sort(generator.choice(count, min(RECALL_SAMPLE, count), replace=False))
    queries = transform(embeddings[rows])
    best = np.full((len(rows), k), -np.inf, dtype=np.float32)
    for start, x in _blocks(embeddings, transform):
        found, near = faiss.knn(queries, x, min(k + 1, len(x)), metric=faiss.METRIC_INNER_PRODUCT)
        found[near + start == rows[:, None]] = -np.inf
        best = -np.sort(-np.concatenate([best, found], axis=1), axis=1)[:, :k]
    return _Sample(rows, queries, best)


def _set_probes(index: Any, sample: _Sample, options: KnnOptions) -> None:
    """As told, or as few as give the recall on the sample, within MAX_PROBES."""
    index.nprobe = min(options.probes or PROBES, index.nlist)
    most = min(MAX_PROBES, index.nlist)
    while options.probes is None and index.nprobe < most:
        found, near = index.search(sample.queries, sample.best.shape[1] + 1)
        if sample.recall(_without_self(sample.rows, near, found)[1]) >= options.min_recall:
            break
        index.nprobe = min(2 * index.nprobe, most)
