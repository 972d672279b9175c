"""Files of lines, read by number: an index of where each line starts, and positioned reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.errors import PipelineError

BLOCK = 1 << 24
BLANK = np.frombuffer(b" \t\r\n\x0b\x0c", np.uint8)


class LineFile:
    """The lines of a file that are not blank; 8 bytes of index each, and 8 more in a file that
    has blank lines. Reading is safe from several threads.

    Raises PipelineError if the file cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY)
            self.bytes = os.fstat(self._fd).st_size
            # Positions just after each line end; the last line may lack one.
            ends = _line_ends(self._fd)
        except OSError as cause:
            raise PipelineError(f"{path} cannot be read: {cause.strerror}") from None
        if self.bytes and (not len(ends) or ends[-1] != self.bytes):
            ends = np.append(ends, self.bytes)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if len(ends) else ends
        kept = self._not_blank(starts, ends)
        # Line numbers count from 1 and count blank lines, as editors do.
        self._numbers = None if kept.all() else np.flatnonzero(kept) + 1
        self._starts, self._ends = starts[kept], ends[kept]

    def __len__(self) -> int:
        return len(self._starts)

    def size(self, at: int) -> int:
        """Bytes of line ``at``, with its end."""
        return int(self._ends[at] - self._starts[at])

    def read(self, at: int) -> bytes:
        """Line ``at`` (from 0, blank lines not counted), without its end."""
        start, end = int(self._starts[at]), int(self._ends[at])
        try:
            line = os.pread(self._fd, end - start, start)
        except OSError as cause:
            raise PipelineError(f"{self.where(at)} cannot be read: {cause.strerror}") from None
        if len(line) < end - start:
            raise PipelineError(f"{self.where(at)}: the file became shorter while it was read")
        return line.rstrip(b"\r\n")

    def where(self, at: int) -> str:
        """File and line, for messages."""
        number = at + 1 if self._numbers is None else self._numbers[at]
        return f"{self.path}, line {number}"

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __getstate__(self) -> dict[str, Any]:
        # A worker gets the index, and opens the file itself.
        return {**self.__dict__, "_fd": -1}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._fd = os.open(self.path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "_fd"):
            self.close()

    def _not_blank(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        kept = np.ones(len(starts), bool)
        if not len(starts):
            return kept
        mapped = np.memmap(self.path, np.uint8, mode="r")
        # Only a line that begins with white space can be blank.
        for at in np.flatnonzero(np.isin(mapped[starts], BLANK)):
            kept[at] = bool(bytes(mapped[starts[at] : ends[at]]).strip())
        return kept


def _line_ends(fd: int) -> np.ndarray:
    found, offset = [], 0
    while block := os.pread(fd, BLOCK, offset):
        found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + (offset + 1))
        offset += len(block)
    return np.concatenate(found).astype(np.int64) if found else np.zeros(0, np.int64)


def files_of(paths: tuple[str, ...], suffixes: tuple[str, ...]) -> list[str]:
    """The files that paths name; a directory stands for those in it with one of ``suffixes``.

    Raises PipelineError for one that does not exist, or a directory without such files.
    """
    found: list[str] = []
    for given in paths:
        path = Path(given)
        if path.is_dir():
            inside = sorted(str(p) for p in path.rglob("*") if p.suffix in suffixes)
            if not inside:
                raise PipelineError(f"{given} holds no files that end in {', '.join(suffixes)}")
            found += inside
        elif path.exists():
            found.append(given)
        else:
            raise PipelineError(f"{given} does not exist")
    return found
