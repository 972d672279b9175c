"""What flows through a pipeline: rows, each with a key that says where it came from."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

Key = tuple[int, ...]


class Row(NamedTuple):
    """key: (source, epoch, index in the source, then one number for each flat_map passed);
    value: a mapping from field to value, or None while only the key is known."""

    key: Key
    value: Any


def generator(seed: int, key: Key) -> np.random.Generator:
    """The random numbers of one operator for one row.

    They depend on the seed and the row's key alone, so that every number of workers, and a run
    that was resumed, draws the same ones.
    """
    text = ",".join(map(str, (seed, *key))).encode()
    word = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=word))
