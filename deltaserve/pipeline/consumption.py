"""What the consumer of a pipeline sees: how long it waits, and what the machine gives."""

from __future__ import annotations

import contextlib
import os
import time


class Consumption:
    """How long the consumer waited for elements, and worked on them between."""

    def __init__(self) -> None:
        self.elements = 0
        self.stalled_ns = 0
        self.worked_ns = 0
        self._since = self.began = time.perf_counter_ns()

    def asked(self) -> None:
        """The consumer wants an element."""
        now = time.perf_counter_ns()
        self.worked_ns += now - self._since
        self._since = now

    def given(self) -> None:
        """It has got one."""
        now = time.perf_counter_ns()
        self.stalled_ns += now - self._since
        self._since = now
        self.elements += 1

    @property
    def wall_ns(self) -> int:
        return self._since - self.began


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes() -> dict[str, int]:
    """Of this process and its children, by process id."""
    import psutil

    own = psutil.Process()
    found = {}
    for process in (own, *own.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            found[str(process.pid)] = process.memory_info().rss
    return found
