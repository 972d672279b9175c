"""Making room in the cache: entries that nobody uses, the longest unused first."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

USED = "used"


class Limits(Protocol):
    @property
    def directory(self) -> Path: ...

    @property
    def max_bytes(self) -> int: ...


def make_room(settings: Limits, mine: Path, needed: int) -> None:
    """So that ``needed`` bytes more fit. Raises OSError (ENOSPC) where what is in use already
    fills the limit."""
    if usage(settings.directory) + needed <= settings.max_bytes:
        return
    with _alone(settings.directory / "room.lock"):
        entries = [e for e in _entries(settings.directory) if e != mine]
        for entry in sorted(entries, key=_last_used):
            if usage(settings.directory) + needed <= settings.max_bytes:
                return
            _remove(entry)
        if usage(settings.directory) + needed > settings.max_bytes:
            raise OSError(errno.ENOSPC, f"its limit of {settings.max_bytes} bytes is reached")


def usage(directory: Path) -> int:
    """Bytes of all entries."""
    return sum(map(_size, _entries(directory)))


def _entries(directory: Path) -> list[Path]:
    with os.scandir(directory) as found:
        return [Path(e.path) for e in found if e.is_dir() and e.name != "digests"]


def _size(entry: Path) -> int:
    try:
        with os.scandir(entry) as files:
            return sum(file.stat().st_size for file in files)
    except FileNotFoundError:  # removed meanwhile
        return 0


def _last_used(entry: Path) -> float:
    try:
        return (entry / USED).stat().st_mtime
    except OSError:
        return 0.0


def _remove(entry: Path) -> None:
    """Unless somebody uses it."""
    try:
        fd = os.open(entry / USED, os.O_RDWR)
    except FileNotFoundError:
        shutil.rmtree(entry, ignore_errors=True)
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(entry, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    fd = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
