"""The loops of near-duplicate removal, in numba: MinHash signatures, and who stands for whom.

A text is words separated by single spaces; its set is the hashes of its w-word sequences (all
of it, if it has fewer words). Hash j of a signature is the lowest value of the j-th random
function over the set.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deltaserve.select.compiled import kernel
from deltaserve.select.random import mix

FNV_OFFSET = np.uint64(0xCBF29CE484222325)
FNV_PRIME = np.uint64(0x100000001B3)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SPACE = 32


def signatures(texts: Sequence[bytes], words: int, hashes: int, seed: int = 0) -> np.ndarray:
    """uint32 [len(texts), hashes]."""
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    joined = np.frombuffer(b"".join(texts), dtype=np.uint8)
    generator = np.random.default_rng(seed)
    # Multiply-shift (Dietzfelbinger et al. 1997): the upper half of an odd multiple, plus a shift.
    factors = generator.integers(0, 1 << 63, hashes, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    shifts = generator.integers(0, 1 << 63, hashes, dtype=np.uint64)
    return _signatures(joined, ends, words, factors, shifts)


def band_hashes(band: np.ndarray) -> np.ndarray:
    """uint64 [n]: equal for rows of uint32 [n, r] that are equal."""
    return _band_hashes(np.ascontiguousarray(band))


@kernel
def stand_ins(
    order: np.ndarray, starts: np.ndarray, tails: np.ndarray, stands_for: np.ndarray
) -> np.ndarray:
    """Keep each row of ``order`` that no kept row stands for yet, and let it stand for its
    ``tails[starts[row]:starts[row + 1]]``. Writes ``stands_for``, returns kept, bool [n]."""
    kept = np.zeros(len(stands_for), dtype=np.bool_)
    for row in order:
        if stands_for[row] != row:
            continue
        kept[row] = True
        for near in tails[starts[row] : starts[row + 1]]:
            if stands_for[near] == near and not kept[near]:
                stands_for[near] = row
    return kept


@kernel
def _signatures(
    joined: np.ndarray, ends: np.ndarray, words: int, factors: np.ndarray, shifts: np.ndarray
) -> np.ndarray:
    found = np.full((len(ends), len(factors)), np.uint32(0xFFFFFFFF), dtype=np.uint32)
    recent = np.zeros(words, dtype=np.uint64)
    start = 0
    for row in range(len(ends)):
        seen = 0
        word = FNV_OFFSET
        for at in range(start, ends[row] + 1):
            if at < ends[row] and joined[at] != SPACE:
                word = (word ^ np.uint64(joined[at])) * FNV_PRIME
                continue
            recent[seen % words] = mix(word)
            seen += 1
            word = FNV_OFFSET
            if seen >= words:
                _lower(found[row], _sequence(recent, seen, words), factors, shifts)
        if seen < words:
            _lower(found[row], _sequence(recent, seen, seen), factors, shifts)
        start = ends[row]
    return found


@kernel
def _sequence(recent: np.ndarray, seen: int, length: int) -> np.uint64:
    """The hash of the last ``length`` words, in their order."""
    value = np.uint64(length)
    for back in range(length):
        value = mix(value + GOLDEN + recent[(seen - length + back) % len(recent)])
    return value


@kernel
def _lower(row: np.ndarray, value: np.uint64, factors: np.ndarray, shifts: np.ndarray) -> None:
    for j in range(len(factors)):
        hashed = np.uint32((factors[j] * value + shifts[j]) >> np.uint64(32))
        if hashed < row[j]:
            row[j] = hashed


@kernel
def _band_hashes(band: np.ndarray) -> np.ndarray:
    hashed = np.empty(band.shape[0], dtype=np.uint64)
    for row in range(band.shape[0]):
        value = GOLDEN
        for column in range(band.shape[1]):
            value = mix(value + GOLDEN + np.uint64(band[row, column]))
        hashed[row] = value
    return hashed
