"""Files of finished rows, memory-mapped: what a cache is made of.

A file holds what became of consecutive rows of a source:

    magic, crc32 of all that follows (uint32), number of source rows n (uint32),
    offsets uint64 [n + 1], then a record for each source row

A record is msgpack: null for a broken row that was skipped, else a list of [numbers of the key
after the row's own, fields]. Arrays are extensions: dtype and shape, then the raw numbers.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from deltaserve.errors import PipelineError
from deltaserve.pipeline.rows import Key, Row

MAGIC = b"DSROWS1\n"
HEAD = struct.Struct("<II")
ARRAY = 1

Record = list[tuple[tuple[int, ...], Any]] | None


class DamagedShardError(Exception):
    """A file is not what was written."""


class Shard:
    """An open file of rows. Raises DamagedShardError, OSError."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < len(MAGIC) + HEAD.size:
                raise DamagedShardError(f"{path} is too short")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = len(MAGIC) + HEAD.size
        checksum, count = HEAD.unpack(self._map[len(MAGIC) : start])
        view = memoryview(self._map)
        if self._map[: len(MAGIC)] != MAGIC or zlib.crc32(view[len(MAGIC) + 4 :]) != checksum:
            raise DamagedShardError(f"{path} does not match its checksum")
        self._offsets = np.frombuffer(view, "<u8", count + 1, start).tolist()
        self.bytes = size

    def record(self, at: int) -> Record:
        """What became of the ``at``-th source row; None: it was broken."""
        found: Record = DECODER.decode(self._map[self._offsets[at] : self._offsets[at + 1]])
        return found


def rows_of(record: Record, key: Key) -> list[Row]:
    """The rows of a record under a key of this pass."""
    return [Row((*key, *rest), value) for rest, value in record or ()]


def records_of(keys: Sequence[Key], rows: Sequence[Row], skipped: Sequence[Key]) -> list[Record]:
    """The records of keys, from the rows that they gave, which are in the same order."""
    records: dict[Key, Record] = {key: [] for key in keys}
    for row in rows:
        record = records[row.key[:3]]
        assert record is not None
        record.append((row.key[3:], row.value))
    records.update(dict.fromkeys(skipped))
    return list(records.values())


def encode(records: Sequence[Record]) -> bytes:
    """The contents of a file. Raises PipelineError: a value that cannot be kept."""
    try:
        encoded = [ENCODER.encode(record) for record in records]
    except (TypeError, OverflowError) as cause:
        raise PipelineError(
            f"a cache cannot keep these rows: {cause}; it keeps text, numbers, bytes, lists, "
            "mappings and arrays"
        ) from None
    first = len(MAGIC) + HEAD.size + 8 * (len(records) + 1)
    sizes = [len(each) for each in encoded]
    offsets = first + np.concatenate([[0], np.cumsum(sizes, dtype=np.uint64)]).astype("<u8")
    body = struct.pack("<I", len(records)) + offsets.tobytes() + b"".join(encoded)
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def _to_extension(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        head = msgspec.msgpack.encode((value.dtype.str, value.shape))
        return msgspec.msgpack.Ext(ARRAY, bytes([len(head)]) + head + value.tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a {type(value).__name__}")


def _from_extension(code: int, data: memoryview) -> Any:
    if code != ARRAY:
        raise DamagedShardError(f"unknown extension {code}")
    dtype, shape = msgspec.msgpack.decode(data[1 : 1 + data[0]])
    # A copy: elements are the consumer's to change.
    return np.frombuffer(data[1 + data[0] :], dtype).reshape(shape).copy()


ENCODER = msgspec.msgpack.Encoder(enc_hook=_to_extension)
DECODER = msgspec.msgpack.Decoder(ext_hook=_from_extension)
