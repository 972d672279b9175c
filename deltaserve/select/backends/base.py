"""What every backend offers to the solvers.

A backend holds the state of the points and runs steps on all shards, one phase after the
other. The rules for a step (``state.writes``) make any order, any number of workers, and a
second run after a crash come to the same state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.select.graph import Graph
from deltaserve.select.problem import Instance
from deltaserve.select.state import State


class Session(ABC):
    """One run of a backend: ``state`` is what the coordinator sees between phases."""

    state: State

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    @abstractmethod
    def map(self, step: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run ``step(shard, state, *arguments)`` on every shard; results in order of shards."""

    @abstractmethod
    def parts(
        self,
        rows: Callable[..., Any],
        solve: Callable[..., NDArray[np.int64]],
        count: int,
        *arguments: Any,
    ) -> Iterator[NDArray[np.int64]]:
        """For each part: ``solve([rows(shard, state, part), ...], *arguments)``, in order."""

    @abstractmethod
    def write(self, name: str, ids: NDArray[np.int64] | slice, values: Any) -> None:
        """Change an array between phases; ``slice(None)`` is all of it."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Backend(ABC):
    """How to run: the settings of a backend. ``open`` starts it for one problem."""

    @abstractmethod
    def open(self, graph: Graph, instance: Instance, scratch: Path | None) -> Session:
        """scratch: directory for the state's files; None keeps the state in memory."""
