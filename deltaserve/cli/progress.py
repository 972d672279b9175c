"""What long commands share: a progress bar on stderr, and SIGTERM that cleans up like Ctrl-C."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

# Phases of ``compress`` and ``verify`` that count layers or steps.
COUNTED = ("read", "measure", "compress", "compare", "distil")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback (what is being done, bytes done, bytes in all; layers or steps for the
    phases that count those)."""
    with _bar(_Amount()) as report:
        yield report


@contextmanager
def count_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback (what is being done, how many done, how many in all; 0: unknown)."""
    with _bar(MofNCompleteColumn()) as report:
        yield report


class _Amount(ProgressColumn):
    """Bytes, or layers and steps. Of several models at once a phase has the model's name before
    it."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes, self._count = DownloadColumn(binary_units=True), MofNCompleteColumn()

    def render(self, task: Task) -> Text:
        counted = task.description.rpartition(": ")[2] in COUNTED
        return (self._count if counted else self._bytes).render(task)


@contextmanager
def _bar(amount: ProgressColumn) -> Iterator[Callable[[str, int, int], None]]:
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        amount,
        TimeRemainingColumn(),
    )
    # Only a terminal gets a bar: a log should hold results and errors.
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        tasks: dict[str, int] = {}

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                # Without a total the bar pulses.
                tasks[phase] = int(
                    bar.add_task(phase, total=total or None, start_time=time.monotonic())
                )
            bar.update(tasks[phase], completed=done)  # type: ignore[arg-type]

        yield report


@contextmanager
def stop_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into KeyboardInterrupt, so that ``with`` blocks remove what they began."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
