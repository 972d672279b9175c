"""Random numbers that depend on what they are for, not on who draws them or when.

Every draw is a hash of (seed, round, id, id): the same for any number of shards and workers
and for any order of work. The mixing function is the finaliser of SplitMix64 (Steele, Lea
and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
"""

from __future__ import annotations

import numpy as np

from deltaserve.select.compiled import kernel

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_LOW = np.uint64(0xFFFFFFFF)


@kernel
def mix(x: np.uint64) -> np.uint64:
    """A bijection of 64-bit words without visible structure."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    return x ^ (x >> np.uint64(31))


@kernel
def draw(seed: int, round_: int, first: int, second: int = 0) -> np.uint64:
    """A uniform 64-bit word for this place; numbers are taken modulo 2^64."""
    x = mix(np.uint64(seed) + _GOLDEN)
    x = mix((x ^ np.uint64(round_)) + _GOLDEN)
    x = mix((x ^ np.uint64(first)) + _GOLDEN)
    return mix((x ^ np.uint64(second)) + _GOLDEN)


@kernel
def uniform(word: np.uint64) -> float:
    """A word as a number in (0, 1)."""
    return (np.float64(word >> np.uint64(11)) + 0.5) * 2.0**-53


@kernel
def permuted(index: int, size: int, seed: int, round_: int, stream: int) -> np.int64:
    """Where a random permutation of range(size) sends ``index``, without storing it.

    Four rounds of a Feistel network on the smallest even number of bits that holds ``size``,
    repeated until the value is inside again (cycle walking: Black and Rogaway, CT-RSA 2002).
    """
    half = np.uint64(1)
    while np.int64(1) << np.int64(np.uint64(2) * half) < size:
        half += np.uint64(1)
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = np.uint64(index)
    while True:
        left, right = x >> half, x & mask
        for step in range(4):
            key = draw(seed, round_, stream, step)
            left, right = right, left ^ (mix(right ^ key) & mask)
        x = (left << half) | right
        if x < np.uint64(size):
            return np.int64(x)
