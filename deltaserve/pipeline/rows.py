"""What flows through a pipeline: rows, each with a key that says where it came from."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import numpy as np

from deltaserve.errors import PipelineError

Key = tuple[int, ...]


class Row(NamedTuple):
    """key: (source, epoch, index in the source, then one number for each flat_map passed);
    value: a mapping from field to value, or None while only the key is known."""

    key: Key
    value: Any


class RowError(PipelineError):
    """An operator cannot work on a row. key: the row's. where: its file and line, if known."""

    def __init__(self, operator: str, key: Key, what: str, where: str = "") -> None:
        super().__init__(operator, key, what, where)
        self.operator, self.key, self.what, self.where = operator, key, what, where

    def __str__(self) -> str:
        _, epoch, row, *parts = self.key
        place = ".".join(map(str, (row, *parts))) + (f" of pass {epoch + 1}" if epoch else "")
        where = f" ({self.where})" if self.where else ""
        return f"{self.operator}, row {place}{where}: {self.what}"


def generator(seed: int, key: Key) -> np.random.Generator:
    """The random numbers of one operator for one row.

    They depend on the seed and the row's key alone, so that every number of workers, and a run
    that was resumed, draws the same ones.
    """
    text = ",".join(map(str, (seed, *key))).encode()
    word = int.from_bytes(hashlib.blake2b(text, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=word))
