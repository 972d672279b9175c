"""A write-ahead journal: what the dispatcher promised survives its death.

One file of frames, each ``length, checksum, check of these two, content`` (content is JSON). A
frame is on disk before ``append`` returns, so whoever got an answer can rely on it. A file that
was cut anywhere inside its last frame opens without that frame: nobody was told about it. Damage
before the last frame is not a cut, and is refused.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from deltaserve.artifact.staging import replacing, sync
from deltaserve.errors import ServiceError

MAGIC = b"deltaserve-journal/1\n"
HEADER = struct.Struct("<III")
# Rewritten when it is this large and mostly history.
COMPACT_BYTES = 1 << 20
COMPACT_RATIO = 4

Record = dict[str, Any]


class Journal:
    """replay: called with every record of the file, oldest first, before anything is appended."""

    def __init__(self, folder: Path, replay: Callable[[Record], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "journal"
        self._lock = _lock(folder)
        try:
            records, good = read(self.path)
        except ServiceError:
            os.close(self._lock)
            raise
        for record in records:
            replay(record)
        self._file = open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0)  # noqa: SIM115
        if good == 0:
            self._file.truncate(0)
            self._file.write(MAGIC)
            good = len(MAGIC)
        self._file.truncate(good)
        self._file.seek(good)
        os.fsync(self._file.fileno())
        sync(folder)
        self.bytes = good
        self._base = good

    def append(self, record: Record) -> None:
        """On disk when this returns.

        Raises:
            ServiceError: it cannot be written; the journal is as it was before.
        """
        frame = _frame(record)
        try:
            if self._file.write(frame) != len(frame):
                raise OSError("the disk took only a part")
            os.fdatasync(self._file.fileno())
        except OSError as error:
            self._file.truncate(self.bytes)
            self._file.seek(self.bytes)
            raise ServiceError(
                f"{self.path} cannot be written ({error}); make room, nothing was promised"
            ) from error
        self.bytes += len(frame)

    def wants_compaction(self) -> bool:
        return self.bytes > max(COMPACT_BYTES, COMPACT_RATIO * self._base)

    def compact(self, records: list[Record]) -> None:
        """Replace the history by records that lead to the same state."""
        with replacing(self.path, durable=True) as partial, partial.open("wb") as file:
            file.write(MAGIC)
            for record in records:
                file.write(_frame(record))
        sync(self.path.parent)
        self._file.close()
        self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
        self.bytes = self._base = self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        self._file.close()
        os.close(self._lock)


def read(path: Path) -> tuple[list[Record], int]:
    """The whole records of a journal, and the number of bytes they take."""
    if not path.exists():
        return [], 0
    data = path.read_bytes()
    if not data.startswith(MAGIC):
        if MAGIC.startswith(data):
            return [], 0
        raise ServiceError(f"{path} is not a journal of this version; use another work folder")
    records: list[Record] = []
    at = len(MAGIC)
    while at + HEADER.size <= len(data):
        length, checksum, check = HEADER.unpack_from(data, at)
        stop = at + HEADER.size + length
        content = data[at + HEADER.size : stop]
        if zlib.crc32(data[at : at + 8]) != check:
            # What a crash leaves of an extended file may be zeros.
            if not any(data[at:]):
                break
        elif stop > len(data) or (zlib.crc32(content) != checksum and stop == len(data)):
            break
        elif zlib.crc32(content) == checksum:
            records.append(msgspec.json.decode(content))
            at = stop
            continue
        raise ServiceError(
            f"{path} is damaged at byte {at}, before its end; restore it, or start the jobs "
            "anew with another work folder"
        )
    return records, at


def _frame(record: Record) -> bytes:
    content = msgspec.json.encode(record)
    start = struct.pack("<II", len(content), zlib.crc32(content))
    return start + struct.pack("<I", zlib.crc32(start)) + content


def _lock(folder: Path) -> int:
    """One dispatcher per folder; the lock goes with the process that holds it."""
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise ServiceError(
            f"another dispatcher uses the work folder {folder}; give each its own"
        ) from None
    return lock
