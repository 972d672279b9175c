"""What long commands share: a progress bar and warnings on stderr, and ways to stop them."""

from __future__ import annotations

import logging
import os
import signal
import sys
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


STOPPING = b"deltaserve: stopping after this element; Ctrl-C again stops at once\n"


@contextmanager
def stop_between() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C or SIGTERM came, for loops that stop between two elements; a second
    one is a KeyboardInterrupt wherever they are."""
    asked = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        os.write(2, STOPPING)  # print may be what was interrupted

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def warnings_told() -> Iterator[None]:
    """What is logged as a warning or worse is told on stderr, one line each."""
    logger, handler = logging.getLogger("deltaserve"), _Told(logging.WARNING)
    logger.addHandler(handler)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


class _Told(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        # By way of sys.stderr, which a progress bar replaces while it is shown.
        message = " ".join(record.getMessage().split())
        print(f"deltaserve: {record.levelname.lower()}: {message}", file=sys.stderr)
