"""Disk to host to device, in background threads: the engine's thread never reads a file."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import torch

from deltaserve.artifact.memory import OpenFile, open_file
from deltaserve.artifact.reader import Delta
from deltaserve.config import EngineConfig
from deltaserve.engine.versions import DeltaVersion
from deltaserve.errors import ArtifactError, DeltaServeError

logger = logging.getLogger(__name__)

THREADS = 2
# Below the engine, which must not wait long for a core because a delta is being prepared. Beside
# its threads, which spin, a niceness of 10 leaves a load a tenth of a core, 5 a quarter.
NICENESS = 5
# What closing waits for jobs that compute: a thread that the interpreter's end meets inside torch
# ends the process with SIGABRT.
CLOSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Job:
    """``load`` ends with operands, ``stage`` with the bytes in host memory, ``merge`` with dense
    projections."""

    kind: str
    version: DeltaVersion


@dataclass(frozen=True, slots=True)
class Done:
    """A job that ended: its result, or why it failed. worked: seconds of a processor, which are
    fewer than ``seconds`` where it rested or waited for a disk."""

    job: Job
    result: Any
    error: str | None
    seconds: float
    worked: float = 0.0


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


@dataclass(eq=False, slots=True)
class _Task:
    """A job on its way. started: when a thread took it, by the clock of ``time.monotonic``."""

    job: Job
    work: Callable[[], object]
    started: float = math.inf


class Loader:
    """Runs jobs in order, ``THREADS`` at a time; their results wait until they are collected.

    timeout_s: what a job may take. One that takes longer has failed, and another thread takes the
    place of the one that it holds: a disk that never answers must not stop the other deltas. The
    threads are daemons, so that it does not keep the process from ending either.
    """

    def __init__(self, timeout_s: float = math.inf) -> None:
        self.timeout_s = timeout_s
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._running: list[_Task] = []
        self._done: deque[Done] = deque()
        self._arrived = threading.Event()
        self._lock = threading.Lock()  # of what runs: a job ends once, by itself or by the clock
        self._pending = 0
        self._threads: list[threading.Thread] = []
        for _ in range(THREADS):
            self._start_thread()

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
        self._tasks.put(_Task(job, work))

    def collect(self) -> list[Done]:
        self._arrived.clear()
        self._give_up()
        done = []
        while self._done:
            done.append(self._done.popleft())
        self._pending -= len(done)
        return done

    def wait(self, seconds: float | None = None) -> None:
        """Until a result has come or a job has taken too long, at most so long."""
        with self._lock:
            oldest = min((task.started for task in self._running), default=math.inf)
        left = max(oldest + self.timeout_s - time.monotonic(), 0.0)
        if seconds is not None:
            left = min(left, seconds)
        elif math.isinf(left) and math.isfinite(self.timeout_s):
            left = self.timeout_s  # what has not begun yet may take too long as well
        self._arrived.wait(None if math.isinf(left) else left)

    def close(self) -> None:
        """Drop what waits, and wait for what runs, but not for a disk that does not answer."""
        with contextlib.suppress(Empty):
            while True:
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        end = time.monotonic() + CLOSE_S
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._serve, name="deltaserve-load", daemon=True)
        self._threads = [each for each in self._threads if each.is_alive()] + [thread]
        thread.start()

    def _serve(self) -> None:
        """What a thread does until it is told to stop, or was given up."""
        _step_back()
        while (task := self._tasks.get()) is not None:
            with self._lock:
                task.started = time.monotonic()
                self._running.append(task)
            began = time.thread_time()
            result, error = self._run(task)
            if not self._end(task, result, error, time.thread_time() - began):
                return

    def _run(self, task: _Task) -> tuple[Any, str | None]:
        """The job's result, or why it failed."""
        try:
            return task.work(), None
        except DeltaServeError as cause:
            return None, str(cause)
        except Exception as cause:  # whatever it was, it concerns this delta alone
            logger.exception("a delta could not be loaded")
            return None, f"it could not be loaded: {type(cause).__name__}: {cause}"

    def _end(self, task: _Task, result: Any, error: str | None, worked: float = 0.0) -> bool:
        """Note the result; False if the job had ended already."""
        with self._lock:
            if task not in self._running:
                return False
            self._running.remove(task)
            seconds = time.monotonic() - task.started
            self._done.append(Done(task.job, result, error, seconds, worked))
        self._arrived.set()
        return True

    def _give_up(self) -> None:
        """Fail the jobs that have taken too long, and replace their threads."""
        now = time.monotonic()
        with self._lock:
            late = [task for task in self._running if now - task.started > self.timeout_s]
        for task in late:
            name = task.job.version.name
            error = (
                f"it was not loaded within {self.timeout_s:g} s (load_timeout_s): look at the disk "
                "that holds it, then register it again"
            )
            if self._end(task, None, error):
                logger.error("the delta %s is given up: %s", name, error)
                self._start_thread()


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


def delta_sizes(config: EngineConfig) -> list[int]:
    """Resident bytes of the configured deltas, from their manifests. Those that cannot be read are
    left out: they are named when they are registered."""
    sizes = []
    for source in config.deltas:
        with contextlib.suppress(DeltaServeError):
            sizes.append(Delta.open(source.path).manifest.sizes.resident.total)
    return sizes


def _step_back() -> None:
    """Lower this thread's priority, where threads have one of their own (Linux), and let torch
    compute in it alone. An engine under a real-time policy does not pass that on.

    With more threads than cores OpenMP spins hardly any more between operations, for good: teams
    of the loading threads made each step of the engine 1.6 times as long.
    """
    torch.set_num_threads(1)
    if hasattr(os, "sched_setscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))  # 0 is the calling thread
    if hasattr(os, "setpriority"):
        own = os.getpriority(os.PRIO_PROCESS, 0)
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(own + NICENESS, 19))
