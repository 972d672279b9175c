"""What the solvers know about each point.

    array    bytes   meaning
    status   1       one of the codes below
    gain     8       what the point adds to what is in the set (divided by its length for
                     token budgets), in units of the instance; may be too high while it lies
                     below the threshold of a sweep
    low      8       lower bound of the gain; touched by bounding only
    part     2       number of the partition; touched by partition greedy only

Memory is taken only for what is touched. With the utility's 4 bytes that is 5 bytes a point
and 8 of gains for the dominance solver, 21 with bounding. In a scratch directory the arrays
are mapped files, which the system may write out, so that next to none of it is anonymous
memory.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import SelectionError
from deltaserve.select.problem import Instance

# SELECTED, CHOSEN and INCLUDED are in the set; FRESH is taken in the sweep that is going on.
UNDECIDED, FRESH, SELECTED, CHOSEN, INCLUDED, OUT = range(6)

TYPES = {"status": np.uint8, "gain": np.int64, "low": np.int64, "part": np.uint16}
NO_PART = np.iinfo(np.uint16).max

Step = TypeVar("Step", bound=Callable[..., Any])


class State:
    """The arrays of all points, and the instance that they are about."""

    def __init__(self, instance: Instance, arrays: dict[str, NDArray[Any]]) -> None:
        self.instance = instance
        self.arrays = arrays
        self.status: NDArray[np.uint8] = arrays["status"]
        self.gain: NDArray[np.int64] = arrays["gain"]
        self.low: NDArray[np.int64] = arrays["low"]
        self.part: NDArray[np.uint16] = arrays["part"]

    @classmethod
    def create(cls, instance: Instance, directory: Path | None) -> State:
        """All zero, which is UNDECIDED; in memory, or in files of a directory."""
        size = len(instance.utility)
        if directory is None:
            return cls(instance, {name: np.zeros(size, kind) for name, kind in TYPES.items()})
        # A mapped file that finds no room later would end the process without a word.
        needed = size * sum(np.dtype(kind).itemsize for kind in TYPES.values())
        free = shutil.disk_usage(directory).free
        if free < needed:
            raise SelectionError(
                f"{directory} has {free} bytes free, but the state of {size} points may take "
                f"{needed}: name another scratch directory"
            )
        for name, kind in TYPES.items():
            with (directory / name).open("wb") as file:
                file.truncate(size * np.dtype(kind).itemsize)
        return cls.map(instance, directory)

    @classmethod
    def map(cls, instance: Instance, directory: Path) -> State:
        """The arrays that ``create`` made in this directory, shared with other processes."""
        shape = (len(instance.utility),)
        arrays = {
            name: np.asarray(np.memmap(directory / name, kind, "r+", shape=shape))
            for name, kind in TYPES.items()
        }
        return cls(instance, arrays)


def writes(*names: str) -> Callable[[Step], Step]:
    """Marks a step with the arrays that it writes.

    A step works on one shard: ``step(shard, state, *arguments)``. The rules that let shards
    be worked on at the same time, again, or elsewhere, with the same result: it writes only
    its own points; of other points it reads only what no step of the same phase changes in
    meaning; a second run changes nothing.
    """

    def mark(step: Step) -> Step:
        step.writes = names  # type: ignore[attr-defined]
        return step

    return mark


def written_by(step: Callable[..., Any]) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(step, "writes", ())
    return found
