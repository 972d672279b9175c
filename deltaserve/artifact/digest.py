"""Content digests: the identity of a base, a fine-tune and a delta.

A checkpoint's digest depends on names, dtypes, shapes and bytes of its tensors only, so
re-sharding or renaming files does not change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from deltaserve.artifact.codecs.base import dtype_name
from deltaserve.artifact.safetensors_io import tensor_bytes

THREADS = 2
# What takes a thread longer to hash than another to start.
WORTH_THREADS = 16 << 20
# Bytes hashed so far, bytes in all.
HashProgress = Callable[[int, int], None]


class TensorSource(Protocol):
    """Anything that holds named tensors: a checkpoint, an adapter."""

    @property
    def num_bytes(self) -> int: ...

    def names(self) -> Sequence[str]: ...

    def tensor(self, name: str) -> torch.Tensor: ...


def tensor_line(name: str, dtype: torch.dtype, shape: Sequence[int], sha256: str) -> str:
    """What one tensor contributes to a digest."""
    return f"{name} {dtype_name(dtype)} {list(shape)} {sha256}\n"


def tensor_digest(name: str, tensor: torch.Tensor) -> str:
    """The tensor's line, with the sha256 of its row-major bytes."""
    sha256 = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    return tensor_line(name, tensor.dtype, tensor.shape, sha256)


def tensor_lines(source: TensorSource) -> list[str]:
    """The lines of all tensors, by two threads if they are large."""

    def work(name: str) -> str:
        return tensor_digest(name, source.tensor(name))

    if source.num_bytes < WORTH_THREADS:
        return [work(name) for name in source.names()]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, source.names()))


def combine(lines: Iterable[str]) -> str:
    """``"sha256:..."`` over the sorted lines."""
    return "sha256:" + hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def checkpoint_digest(source: TensorSource, progress: HashProgress | None = None) -> str:
    """``"sha256:..."`` over all tensors of a checkpoint; two threads, no copies of tensors."""
    done = 0
    lines = []

    def work(name: str) -> tuple[str, int]:
        tensor = source.tensor(name)
        return tensor_digest(name, tensor), tensor.numel() * tensor.element_size()

    # hashlib lets go of the interpreter lock for large buffers.
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for line, size in pool.map(work, source.names()):
                lines.append(line)
                done += size
                if progress is not None:
                    progress(done, source.num_bytes)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return combine(lines)
