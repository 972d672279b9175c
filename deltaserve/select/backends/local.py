"""In this process: shards are worked on by threads (compiled steps release the interpreter)."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import SelectionError
from deltaserve.select.backends.base import Backend, Session
from deltaserve.select.graph import Graph
from deltaserve.select.problem import Instance
from deltaserve.select.state import State


@dataclass(frozen=True)
class Local(Backend):
    """workers: threads; a graph of one shard uses one."""

    workers: int = 1

    def __post_init__(self) -> None:
        require_workers(self.workers)

    def open(self, graph: Graph, instance: Instance, scratch: Path | None) -> LocalSession:
        return LocalSession(graph, instance, scratch, self.workers)


class LocalSession(Session):
    def __init__(
        self, graph: Graph, instance: Instance, scratch: Path | None, workers: int
    ) -> None:
        super().__init__(graph)
        self._directory = make_scratch(scratch) if scratch else None
        try:
            self.state = State.create(instance, self._directory)
        except SelectionError:
            self._remove()
            raise
        self._pool = ThreadPoolExecutor(workers) if workers > 1 else None
        self._each = self._pool.map if self._pool else map

    def map(self, step: Callable[..., Any], *arguments: Any) -> list[Any]:
        def run(number: int) -> Any:
            return step(self.graph.shards[number], self.state, *arguments)

        return list(self._each(run, range(len(self.graph.shards))))

    def parts(
        self,
        rows: Callable[..., Any],
        solve: Callable[..., NDArray[np.int64]],
        count: int,
        *arguments: Any,
    ) -> Iterator[NDArray[np.int64]]:
        def run(part: int) -> NDArray[np.int64]:
            pieces = list(map(rows, self.graph.shards, repeat(self.state), repeat(part)))
            return solve(pieces, *arguments)

        return iter(self._each(run, range(count)))

    def write(self, name: str, ids: NDArray[np.int64] | slice, values: Any) -> None:
        self.state.arrays[name][ids] = values

    def close(self) -> None:
        if self._pool:
            self._pool.shutdown()
        self._remove()

    def _remove(self) -> None:
        if self._directory:
            shutil.rmtree(self._directory)


def make_scratch(parent: Path) -> Path:
    """A new directory for the files of one run. Raises SelectionError if it cannot be made."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix="select.", dir=parent))
    except OSError as error:
        raise SelectionError(f"cannot use {parent} as scratch directory: {error}") from None


def require_workers(workers: int) -> None:
    if workers < 1:
        raise SelectionError(f"the number of workers is {workers}, but must be at least 1")
