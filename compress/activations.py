"""Activations between decoder layers, on disk: memory holds those of one batch.

B sequences of T tokens, D the hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from deltaserve.artifact.staging import replacing


class Activations:
    """One file per layer: what goes into it, float32 [B, T, D] of every batch.

    A file appears when it is complete, so that a killed run finds either all activations
    before a layer or none. ``keep``: files stay until the folder goes, else ``drop`` removes them.
    """

    def __init__(self, folder: Path, shapes: list[tuple[int, int]], width: int) -> None:
        """shapes: [B, T] of each batch."""
        self._folder = folder
        self._shapes = [(*shape, width) for shape in shapes]
        folder.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._shapes)

    def has(self, layer: int) -> bool:
        return self._path(layer).is_file()

    def read(self, layer: int, number: int) -> torch.Tensor:
        """[B, T, D] of a batch, a copy."""
        start = sum(b * t * d for b, t, d in self._shapes[:number])
        shape = self._shapes[number]
        mapped = np.memmap(
            self._path(layer), dtype=np.float32, mode="r", offset=4 * start, shape=shape
        )
        return torch.from_numpy(np.array(mapped))

    def write(self, layer: int, batches: Iterable[torch.Tensor]) -> None:
        """What goes into ``layer``, batch after batch; replaces the file whole."""
        with replacing(self._path(layer)) as partial, partial.open("wb") as file:
            for hidden_BTD in batches:
                file.write(hidden_BTD.float().cpu().contiguous().numpy().data)

    def drop(self, layer: int) -> None:
        """Forget what went into ``layer``."""
        self._path(layer).unlink(missing_ok=True)

    def _path(self, layer: int) -> Path:
        return self._folder / f"hidden-{layer:05d}.f32"
