"""Intermediate results in a folder, so that an interrupted selection can go on.

A result's name holds a hash of all that decides it; a file that is there is whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.select.graph import Graph


class Store:
    """Results under ``folder``, which is made if it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, name: str, *decided_by: Any) -> Path:
        """Where the result ``name`` lies that was decided by these values."""
        key = hashlib.sha256(repr(decided_by).encode()).hexdigest()[:16]
        return self.folder / f"{name}-{key}"

    def array(self, make: Callable[[Path], np.ndarray], name: str, *decided_by: Any) -> np.ndarray:
        """A memory-mapped array: found, or made. ``make`` may write the .npy file that it gets."""
        path = self.path(name, *decided_by).with_suffix(".npy")
        if not path.exists():
            partial = path.with_suffix(".partial.npy")
            made = make(partial)
            if isinstance(made, np.memmap):
                made.flush()
            else:
                np.save(partial, made)
            partial.rename(path)
        return np.load(path, mmap_mode="r")

    def graph(self, make: Callable[[Path], Graph], name: str, *decided_by: Any) -> Graph:
        """A graph on the disk: found, or made by ``make`` in the directory that it gets."""
        path = self.path(name, *decided_by)
        if not path.exists():
            partial = path.with_suffix(".partial")
            shutil.rmtree(partial, ignore_errors=True)
            make(partial)
            partial.rename(path)
        return Graph.open(path)


def stamp(model: str | None) -> tuple[Any, ...]:
    """What identifies a model: its name, and the sizes and times of its files if it is local."""
    folder = Path(model or "")
    if model is None or not folder.is_dir():
        return (model,)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return (model, *((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files))


def digest(array: np.ndarray) -> str:
    """ "sha256:..." of dtype, shape and bytes."""
    hashed = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    for start in range(0, len(array), 8192):
        hashed.update(np.ascontiguousarray(array[start : start + 8192]).tobytes())
    return f"sha256:{hashed.hexdigest()}"
