"""What a thread did with its time: on a core, in line for one, or waiting for something else."""

from __future__ import annotations

import os
import time

SCHEDSTAT = "/proc/thread-self/schedstat"
Reading = tuple[int, int, int]
"""Wall, CPU, and in line for a core, in ns."""


class Clock:
    """The clocks of the thread that makes it.

    Only Linux says how long a thread stood in line for a core; elsewhere that is 0 and counts
    as waiting.
    """

    def __init__(self) -> None:
        try:
            self._file = os.open(SCHEDSTAT, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._file = -1

    def read(self) -> Reading:
        queued = int(os.pread(self._file, 64, 0).split()[1]) if self._file >= 0 else 0
        return time.perf_counter_ns(), time.thread_time_ns(), queued

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()
