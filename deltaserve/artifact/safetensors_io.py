"""Writing safetensors files one tensor at a time, in bounded memory.

The format puts the sizes of all tensors first, but a compressor learns them last. So
data goes to a spool file beside the target, and is copied behind the header when the
shard is complete. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch

MAX_SHARD_BYTES = 5_000_000_000
COPY_BYTES = 8 << 20
ALIGNMENT = 8

TO_CODE = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
FROM_CODE = {code: dtype for dtype, code in TO_CODE.items()}


@dataclass(frozen=True)
class Spooled:
    """A tensor waiting in the spool file: its place there and its header entry."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass
class Shard:
    """One safetensors file under construction."""

    path: Path
    tensors: list[Spooled] = field(default_factory=list)
    size: int = 0


@dataclass(frozen=True)
class Written:
    """files: final name -> bytes. index: tensor name -> file. headers: bytes beside the data."""

    files: dict[str, int]
    index: dict[str, str]
    headers: int


class SafetensorsWriter:
    """Writes ``<stem>.safetensors`` in ``directory``, or numbered shards past a size.

    Not a context manager: the directory is temporary and whoever made it removes it.
    """

    def __init__(
        self, directory: Path, stem: str, *, max_shard_bytes: int = MAX_SHARD_BYTES
    ) -> None:
        self._directory = directory
        self._stem = stem
        self._max = max_shard_bytes
        self._names: set[str] = set()
        self._done: list[Shard] = []
        self._shard = Shard(self._shard_path())
        self._spool: BinaryIO | None = None

    def add(self, name: str, tensor: torch.Tensor) -> str:
        """Append a tensor; returns the hex sha256 of its bytes."""
        assert name not in self._names, f"{name} written twice"
        self._names.add(name)
        data = tensor_bytes(tensor)
        if self._shard.tensors and self._shard.size + len(data) > self._max:
            self._close_shard()
        if self._spool is None:
            self._spool = self._shard.path.with_suffix(".spool").open("w+b")
        self._spool.write(data)
        start = self._shard.size
        self._shard.tensors.append(
            Spooled(name, tensor.dtype, tuple(tensor.shape), start, len(data))
        )
        self._shard.size += len(data)
        return hashlib.sha256(data).hexdigest()

    def finish(self) -> Written:
        """Complete the files and give them their final names."""
        self._close_shard()
        files: dict[str, int] = {}
        index: dict[str, str] = {}
        for number, shard in enumerate(self._done, 1):
            suffix = "" if len(self._done) == 1 else f"-{number:05d}-of-{len(self._done):05d}"
            final = self._directory / f"{self._stem}{suffix}.safetensors"
            shard.path.rename(final)
            files[final.name] = final.stat().st_size
            index |= {tensor.name: final.name for tensor in shard.tensors}
        data = sum(shard.size for shard in self._done)
        return Written(files, index, sum(files.values()) - data)

    def _shard_path(self) -> Path:
        return self._directory / f"{self._stem}.{len(self._done)}.tmp"

    def _close_shard(self) -> None:
        # Aligned data needs the widest elements first; names make the order reproducible.
        order = sorted(self._shard.tensors, key=lambda t: (-t.dtype.itemsize, t.name))
        with self._shard.path.open("wb") as out:
            out.write(_header(order))
            if self._spool is not None:
                for tensor in order:
                    _copy(self._spool, out, tensor.start, tensor.size)
            out.flush()
            os.fsync(out.fileno())
        if self._spool is not None:
            self._spool.close()
            self._shard.path.with_suffix(".spool").unlink()
        self._done.append(self._shard)
        self._shard, self._spool = Shard(self._shard_path()), None


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order, without a copy if it is contiguous."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(order: list[Spooled]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in order:
        entries[tensor.name] = {
            "dtype": TO_CODE[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    source.seek(start)
    while size:
        block = source.read(min(size, COPY_BYTES))
        target.write(block)
        size -= len(block)
