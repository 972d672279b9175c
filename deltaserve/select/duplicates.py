"""Near-duplicates: MinHash over words, or cosine of embeddings. Own steps, before selection.

n samples. Both say which samples stay, and for each that goes, which one stands for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.graph import Graph
from deltaserve.select.minhash import band_hashes, signatures, stand_ins
from deltaserve.select.pool import Progress, no_progress

HASHES = 128
# Scripts without spaces between words: there a character counts as a word.
UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
BLOCK = 4096


@dataclass(frozen=True)
class Duplicates:
    """keep: bool [n]. stands_for: int64 [n], the kept sample that stands for each (itself, if
    it is kept)."""

    keep: np.ndarray
    stands_for: np.ndarray

    @property
    def removed(self) -> int:
        return int((~self.keep).sum())


def near_duplicates(
    texts: Iterable[str],
    count: int,
    *,
    threshold: float = 0.8,
    words: int = 3,
    utility: np.ndarray | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> Duplicates:
    """Texts whose sets of ``words``-word sequences overlap by ``threshold`` (Jaccard) or more.

    MinHash with 128 hashes, locality-sensitive bands (Broder 1997; Leskovec et al., Mining of
    Massive Datasets, ch. 3): candidates share a band, pairs are those whose signatures agree on
    at least ``threshold`` of the hashes. The best of each connected cluster stays: that of
    highest utility (float [n]), the first of equals. Holds 512 bytes a sample.
    """
    if not 0 < threshold <= 1 or words < 1:
        raise SelectionError(
            f"near-duplicates need a threshold in 0 to 1 and 1 word or more, not {threshold} and "
            f"{words}"
        )
    found = np.empty((count, HASHES), dtype=np.uint32)
    block: list[bytes] = []
    done = 0
    for done, text in enumerate(texts, 1):
        block.append(plain_words(text))
        if len(block) == BLOCK or done == count:
            found[done - len(block) : done] = signatures(block, words, HASHES, seed)
            block = []
            progress("near-duplicates", done, count)
    assert done == count
    pairs = _similar_pairs(found, threshold)
    return keep_best(_clusters(count, pairs), utility)


def plain_words(text: str) -> bytes:
    """The words of a text in lower case, separated by single spaces."""
    return " ".join(WORD.findall(text.lower())).encode("utf-8", "surrogatepass")


def similar_duplicates(
    graph: Graph,
    contents: np.ndarray,
    *,
    threshold: float = 0.95,
    utility: np.ndarray | None = None,
) -> Duplicates:
    """Samples joined by an edge of ``threshold`` or more, as SemDeDup (Abbas et al. 2023).

    In order of utility (float [n]; the first of equals), each sample stays unless one that
    stays already is that similar to it: nothing is removed without such a stand-in, however
    long the chain of likenesses. contents: uint64 [n]; of equal ones only the best can stay,
    since a clique of copies larger than k hides from a k-neighbour graph.
    """
    exact = keep_best(contents, utility)
    heads, tails = _edges_above(graph, threshold, exact.stands_for)
    starts = np.searchsorted(heads, np.arange(graph.num_points + 1))
    order = _best_first(graph.num_points, utility)
    stands_for = exact.stands_for.copy()
    kept = stand_ins(order[exact.keep[order]], starts, tails, stands_for)
    return Duplicates(kept, stands_for[stands_for])


def keep_best(clusters: np.ndarray, utility: np.ndarray | None = None) -> Duplicates:
    """The best of the samples with equal ``clusters`` [n] stays."""
    count = len(clusters)
    order = _best_first(count, utility)
    _, first, inverse = np.unique(clusters[order], return_index=True, return_inverse=True)
    stands_for = np.empty(count, dtype=np.int64)
    stands_for[order] = order[first][inverse]
    return Duplicates(stands_for == np.arange(count), stands_for)


def _best_first(count: int, utility: np.ndarray | None) -> np.ndarray:
    """Rows by descending utility, the lower row first among equals."""
    if utility is None:
        return np.arange(count)
    return np.argsort(-utility, kind="stable")


def _bands(threshold: float) -> tuple[int, int]:
    """Bands and rows whose S-curve (1/bands)^(1/rows) lies just below the threshold: a pair at
    the threshold is then a candidate, and the signatures decide."""
    shapes = [(HASHES // rows, rows) for rows in (1, 2, 4, 8, 16, 32)]
    below = [(b, r) for b, r in shapes if (1 / b) ** (1 / r) <= 0.9 * threshold]
    return below[-1] if below else shapes[0]


def _similar_pairs(found: np.ndarray, threshold: float) -> np.ndarray:
    """int64 [m, 2]: in every bucket of every band, each sample with the bucket's first and with
    the one before it, where their signatures agree enough."""
    bands, rows = _bands(threshold)
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for band in range(bands):
        hashed = band_hashes(found[:, band * rows : (band + 1) * rows])
        order = np.argsort(hashed, kind="stable")
        ordered = hashed[order]
        new = np.r_[True, ordered[1:] != ordered[:-1]]
        firsts = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        others = np.flatnonzero(~new)
        for mates in (firsts[others], order[others - 1]):
            candidates = np.stack([mates, order[others]], axis=1)
            pairs.append(candidates[_agreement(found, candidates) >= threshold])
    return np.unique(np.concatenate(pairs), axis=0)


def _agreement(found: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """The share of equal hashes of each pair, which estimates the Jaccard similarity."""
    shares = np.empty(len(pairs))
    for start in range(0, len(pairs), BLOCK):
        left, right = pairs[start : start + BLOCK].T
        shares[start : start + BLOCK] = (found[left] == found[right]).mean(axis=1)
    return shares


def _clusters(count: int, pairs: np.ndarray) -> np.ndarray:
    """The lowest row of each row's connected component: int64 [n]."""
    root = np.arange(count)
    while True:
        lower = np.minimum(root[pairs[:, 0]], root[pairs[:, 1]])
        before = root.copy()
        np.minimum.at(root, root[pairs[:, 0]], lower)
        np.minimum.at(root, root[pairs[:, 1]], lower)
        root = root[root]
        if np.array_equal(root, before):
            return root


def _edges_above(
    graph: Graph, threshold: float, stands_for: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Heads (ascending) and tails of the similar edges, between the representatives of equal
    samples: a likeness to one copy is a likeness to all."""
    heads, tails = [], []
    for shard in graph.shards:
        rows = np.repeat(np.arange(shard.start, shard.stop), np.diff(shard.indptr))
        near = np.asarray(shard.weights) >= threshold
        heads.append(stands_for[rows[near]])
        tails.append(stands_for[np.asarray(shard.indices)[near]])
    head, tail = np.concatenate(heads), np.concatenate(tails)
    order = np.argsort(head, kind="stable")
    return head[order], tail[order]
