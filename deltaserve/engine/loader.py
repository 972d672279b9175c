"""Disk to host to device, in background threads: the engine's thread never reads a file."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from deltaserve.artifact.memory import OpenFile, open_file
from deltaserve.artifact.reader import Delta
from deltaserve.engine.versions import DeltaVersion
from deltaserve.errors import ArtifactError, DeltaServeError

logger = logging.getLogger(__name__)

THREADS = 2
# Below the engine, which must not wait for a core because a delta is being prepared.
NICENESS = 10


@dataclass(frozen=True, slots=True)
class Job:
    """``load`` ends with operands, ``stage`` with the bytes in host memory, ``merge`` with dense
    projections."""

    kind: str
    version: DeltaVersion


@dataclass(frozen=True, slots=True)
class Done:
    """A job that ended: its result, or why it failed."""

    job: Job
    result: Any
    error: str | None
    seconds: float


class Background(Protocol):
    """Threads for jobs, as ``Loader`` has them."""

    @property
    def idle(self) -> bool: ...

    @property
    def full(self) -> bool: ...

    def submit(self, job: Job, work: Callable[[], object]) -> None: ...

    def collect(self) -> list[Done]: ...

    def wait(self, seconds: float | None = None) -> None: ...

    def close(self) -> None: ...


class Loader:
    """Runs jobs in order, ``THREADS`` at a time; their results wait until they are collected."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "deltaserve-load", _step_back)
        self._done: deque[Done] = deque()
        self._arrived = threading.Event()
        self._pending = 0

    @property
    def idle(self) -> bool:
        """No job runs, and no result waits."""
        return self._pending == 0

    @property
    def full(self) -> bool:
        """Another job would have to wait, so that the order could be chosen later."""
        return self._pending >= THREADS

    def submit(self, job: Job, work: Callable[[], object]) -> None:
        self._pending += 1
        self._pool.submit(self._run, job, work)

    def collect(self) -> list[Done]:
        self._arrived.clear()
        done = []
        while self._done:
            done.append(self._done.popleft())
        self._pending -= len(done)
        return done

    def wait(self, seconds: float | None = None) -> None:
        """Until a result has come, at most so long."""
        self._arrived.wait(seconds)

    def close(self) -> None:
        """Drop what waits; what runs ends by itself, however slow its disk is."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, job: Job, work: Callable[[], object]) -> None:
        start = time.perf_counter()
        result, error = None, None
        try:
            result = work()
        except DeltaServeError as cause:
            error = str(cause)
        except Exception as cause:  # whatever it was, it concerns this delta alone
            logger.exception("a delta could not be loaded")
            error = f"it could not be loaded: {type(cause).__name__}: {cause}"
        self._done.append(Done(job, result, error, time.perf_counter() - start))
        self._arrived.set()


class Reader:
    """Artifacts of one base. opener: how files are opened to be read whole, for benchmarks."""

    def __init__(self, base_digest: str, opener: OpenFile = open_file) -> None:
        self.base_digest = base_digest
        self.opener = opener

    def open(self, path: str) -> Delta:
        """Look at the manifest, not at the weights. Raises ArtifactError, BaseMismatchError."""
        delta = Delta.open(path)
        delta.check_base(self.base_digest)
        return delta

    def read(self, version: DeltaVersion) -> Delta:
        """Raises ArtifactError for damage, and for files that were replaced meanwhile."""
        delta = Delta.read(version.path, self.opener)
        if delta.manifest.digest != version.digest:
            raise ArtifactError(
                f"{version.path} holds another delta than when it was registered "
                f"({delta.manifest.digest}, not {version.digest}); register it again to serve it"
            )
        return delta


def _step_back() -> None:
    """Lower this thread's priority, where threads have one of their own (Linux), and let torch
    compute in it alone.

    With more threads than cores OpenMP spins hardly any more between operations, for good: teams
    of the loading threads made each step of the engine 1.6 times as long.
    """
    torch.set_num_threads(1)
    if hasattr(os, "setpriority"):
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(own + NICENESS, 19))
