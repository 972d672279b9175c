"""Progress of the demo on stderr: bars on a terminal, a line for each finished step elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed


class Display:
    """One line for each step, made when the step is first heard of."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}

    def report(self, step: str, done: float) -> None:
        """`done`: the share of `step` that is done, 0 to 1; 1 may be said twice."""
        if step not in self._tasks:
            self._tasks[step] = self._bars.add_task(step, total=1.0)
            self._started[step] = time.monotonic()
        self._bars.update(self._tasks[step], completed=done)
        if done >= 1.0 and self._bars.disable and step in self._started:
            seconds = time.monotonic() - self._started.pop(step)
            print(f"{step}: {seconds:.1f} s", file=sys.stderr, flush=True)


@contextmanager
def display() -> Iterator[Display]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<14}"), BarColumn(), TaskProgressColumn(), Elapsed())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield Display(bars)
