"""Embeddings without a model: which words and pairs of words a text has.

Good enough to tell copies and near-copies apart and to spread a selection over topics that
differ in their words; what means the same in other words looks different to it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from deltaserve.select.compiled import kernel
from deltaserve.select.duplicates import BLOCK, plain_words
from deltaserve.select.embed import new_matrix
from deltaserve.select.minhash import FNV_OFFSET, FNV_PRIME, SPACE
from deltaserve.select.pool import Progress, no_progress
from deltaserve.select.random import mix

DIMENSIONS = 256
PAIR = np.uint64(0x9E3779B97F4A7C15)


def embed_words(
    texts: Iterable[str], count: int, out: Path | None = None, progress: Progress = no_progress
) -> np.ndarray:
    """float32 [count, 256]: words and pairs of neighbouring words, hashed to a dimension and a
    sign (Weinberger et al. 2009), each counted by the square root of its occurrences.
    out: as for `embed.embed_pool`."""
    found = new_matrix(count, DIMENSIONS, out)
    block: list[bytes] = []
    done = 0
    for done, text in enumerate(texts, 1):
        block.append(plain_words(text))
        if len(block) == BLOCK or done == count:
            ends = np.cumsum([len(words) for words in block], dtype=np.int64)
            joined = np.frombuffer(b"".join(block), dtype=np.uint8)
            sums = _hashed(joined, ends, DIMENSIONS)
            found[done - len(block) : done] = np.sign(sums) * np.sqrt(np.abs(sums))
            block = []
            progress("embedding", done, count)
    assert done == count
    return found


@kernel
def _hashed(joined: np.ndarray, ends: np.ndarray, dims: int) -> np.ndarray:
    found = np.zeros((len(ends), dims), dtype=np.float32)
    start = 0
    for row in range(len(ends)):
        word, before, first = FNV_OFFSET, np.uint64(0), True
        for at in range(start, ends[row] + 1):
            if at < ends[row] and joined[at] != SPACE:
                word = (word ^ np.uint64(joined[at])) * FNV_PRIME
                continue
            one = mix(word)
            _count(found[row], one)
            if not first:
                _count(found[row], mix(before * PAIR + one))
            before, first, word = one, False, FNV_OFFSET
        start = ends[row]
    return found


@kernel
def _count(row: np.ndarray, value: np.uint64) -> None:
    """The lowest bit is the sign, the others the dimension."""
    sign = np.float32(1) if value & np.uint64(1) else np.float32(-1)
    row[np.int64((value >> np.uint64(1)) % np.uint64(len(row)))] += sign
