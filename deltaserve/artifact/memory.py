"""Safetensors files read into memory, for whoever must not depend on the files any longer.

A mapped file that is truncated by somebody else ends the process with SIGBUS at the next access.
What was read stays what it was, and a short read is an ordinary error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import torch

from deltaserve.artifact.safetensors_io import FROM_CODE, tensor_bytes
from deltaserve.errors import DeltaServeError

MAX_HEADER_BYTES = 100 << 20
OpenFile = Callable[[Path], BinaryIO]


def open_file(path: Path) -> BinaryIO:
    return path.open("rb")


class MemoryShards:
    """Several safetensors files as one mapping of names to tensors of our own.

    Each tensor has its own memory, so that parts of a delta can be kept and others dropped.
    ``error`` is the class raised for anything wrong with the files.
    """

    def __init__(
        self, files: Iterable[Path], error: type[DeltaServeError], opener: OpenFile = open_file
    ) -> None:
        self._error = error
        self._file: dict[str, Path] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for path in files:
            self._read(path, opener)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def names(self) -> list[str]:
        return sorted(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        return self._tensors[name].dtype

    def file(self, name: str) -> Path:
        return self._file[name]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor itself: never write to it."""
        return self._tensors[name]

    def _read(self, path: Path, opener: OpenFile) -> None:
        try:
            with opener(path) as file:
                for name, tensor, start in _header(file):
                    if name in self._file:
                        raise ValueError(f"{name} is in {self._file[name].name} as well")
                    _fill(file, tensor, start)
                    self._tensors[name], self._file[name] = tensor, path
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as cause:
            raise self._error(
                f"{path} cannot be read, or is not a safetensors file ({cause}); copy it again"
            ) from None


def _header(file: BinaryIO) -> list[tuple[str, torch.Tensor, int]]:
    """(name, empty tensor, where its bytes start in the file), in the order of the file.

    Raises ValueError and its like for a header that does not describe the file.
    """
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length <= MAX_HEADER_BYTES:
        raise ValueError(f"its header would have {length} bytes")
    entries = json.loads(file.read(length))
    size = file.seek(0, 2)
    found = []
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        dtype, shape = FROM_CODE[entry["dtype"]], [int(n) for n in entry["shape"]]
        start, end = (8 + length + int(offset) for offset in entry["data_offsets"])
        # Before any memory is taken: a damaged shape must not ask for all there is.
        if min(shape, default=1) < 0 or end - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has another size than its shape")
        if not 8 + length <= start <= end <= size:
            raise ValueError(f"{name} lies outside the file, which has {size} bytes")
        found.append((name, torch.empty(shape, dtype=dtype), start))
    found.sort(key=lambda item: item[2])
    for (_, tensor, start), (name, _, follower) in pairwise(found):
        if follower < start + tensor.nbytes:
            raise ValueError(f"{name} overlaps another tensor")
    return found


def _fill(file: BinaryIO, tensor: torch.Tensor, start: int) -> None:
    target = tensor_bytes(tensor)
    file.seek(start)
    while target:
        count = file.readinto(target)  # type: ignore[attr-defined]
        if not count:
            raise ValueError("the file ends too early")
        target = target[count:]
