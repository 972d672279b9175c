"""Reading safetensors files lazily, with errors that name the file and the tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from deltaserve.artifact.codecs.base import dense_bytes
from deltaserve.artifact.safetensors_io import FROM_CODE
from deltaserve.errors import DeltaServeError


class ShardSet:
    """Several safetensors files as one mapping of names to memory-mapped tensors.

    ``error`` is the class raised for anything wrong with the files.
    """

    def __init__(self, files: Iterable[Path], error: type[DeltaServeError]) -> None:
        self._error = error
        self._files: dict[str, tuple[Path, Any]] = {}
        self._meta: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for path in files:
            self._open(path)

    def _open(self, path: Path) -> None:
        if not path.is_file():
            raise self._error(f"{path} is missing; copy or download the model again")
        try:
            handle = safe_open(str(path), framework="pt", device="cpu")
            for name in handle.keys():  # noqa: SIM118, it is not a dict
                piece = handle.get_slice(name)
                code = piece.get_dtype()
                if code not in FROM_CODE:
                    raise self._error(f"{path}: {name} has the unknown dtype {code}")
                if name in self._files:
                    raise self._error(
                        f"{path}: {name} is also in {self._files[name][0].name}; keep one of them"
                    )
                self._files[name] = path, handle
                self._meta[name] = tuple(piece.get_shape()), FROM_CODE[code]
        except (SafetensorError, OSError, ValueError) as cause:
            raise self._error(
                f"{path} is truncated or not a safetensors file ({cause}); copy it again"
            ) from None

    @property
    def num_bytes(self) -> int:
        return sum(self.size(name) for name in self._meta)

    def names(self) -> list[str]:
        return sorted(self._meta)

    def __contains__(self, name: str) -> bool:
        return name in self._meta

    def shape(self, name: str) -> tuple[int, ...]:
        return self._meta[name][0]

    def dtype(self, name: str) -> torch.dtype:
        return self._meta[name][1]

    def size(self, name: str) -> int:
        """Bytes of the tensor."""
        return dense_bytes(*self._meta[name])

    def file(self, name: str) -> Path:
        return self._files[name][0]

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, backed by the mapped file: never write to it."""
        path, handle = self._files[name]
        try:
            tensor: torch.Tensor = handle.get_tensor(name)
        except (SafetensorError, OSError, ValueError, RuntimeError) as cause:
            raise self._error(f"{path}: cannot read {name} ({cause}); copy it again") from None
        return tensor
