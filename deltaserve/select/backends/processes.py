"""In several processes on this machine, which share the state as mapped files.

Workers are started by ``python -m deltaserve.select.backends.worker`` and spoken to through
their pipes, so scripts and notebooks need no ``__main__`` guard. A worker that dies is
replaced and its step repeated, which changes nothing (see ``state.writes``).
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from multiprocessing.connection import wait
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from deltaserve.errors import SelectionError
from deltaserve.select.backends.base import Backend, Session
from deltaserve.select.backends.local import make_scratch, require_workers
from deltaserve.select.graph import Graph
from deltaserve.select.problem import Instance
from deltaserve.select.state import State

# Deaths without a finished step in between, after which the cause is not chance.
MAX_DEATHS = 5
SHARED_MEMORY = Path("/dev/shm")
# State (19), utility, lengths and groups.
BYTES_PER_POINT = 35
ARRAYS = ("utility", "length", "group")


@dataclass(frozen=True)
class Processes(Backend):
    """workers: processes. Without a scratch directory the files lie in shared memory, or in the
    system's temporary directory when that has no room."""

    workers: int = 2

    def __post_init__(self) -> None:
        require_workers(self.workers)

    def open(self, graph: Graph, instance: Instance, scratch: Path | None) -> ProcessSession:
        return ProcessSession(graph, instance, scratch, self.workers)


class Worker:
    """One process, idle or busy with the task of this number."""

    def __init__(self, directory: Path, graph: Path) -> None:
        command = [sys.executable, "-m", "deltaserve.select.backends.worker"]
        paths = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [*command, str(directory), str(graph)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": paths},
        )
        self.input = cast(IO[bytes], self.process.stdin)
        self.output = cast(IO[bytes], self.process.stdout)
        self.task: int | None = None

    def start(self, number: int, task: tuple[Any, ...]) -> None:
        self.task = number
        # A dead worker's output has ended too, which is where deaths are seen.
        with suppress(BrokenPipeError):
            pickle.dump(task, self.input, pickle.HIGHEST_PROTOCOL)
            self.input.flush()

    def result(self) -> Any:
        """What the task returned. Raises EOFError when the process died, or what it raised."""
        try:
            good, found = pickle.load(self.output)
        except pickle.UnpicklingError:
            raise EOFError from None
        self.task = None
        if not good:
            raise found
        return found

    def stop(self) -> None:
        for pipe in (self.input, self.output):
            with suppress(BrokenPipeError):
                pipe.close()
        self.process.kill()
        self.process.wait()


class ProcessSession(Session):
    def __init__(
        self, graph: Graph, instance: Instance, scratch: Path | None, workers: int
    ) -> None:
        super().__init__(graph)
        self._directory = make_scratch(scratch or shared_directory(graph))
        self._workers: list[Worker] = []
        try:
            self.state = State.create(instance, self._directory)
            save_instance(instance, self._directory)
            self._graph = graph.path or self._directory / "graph"
            if graph.path is None:
                graph.save(self._graph)
            for _ in range(workers):
                self._workers.append(Worker(self._directory, self._graph))
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    def map(self, step: Callable[..., Any], *arguments: Any) -> list[Any]:
        return self._run(
            [("step", step, number, arguments) for number in range(len(self.graph.shards))]
        )

    def parts(
        self,
        rows: Callable[..., Any],
        solve: Callable[..., NDArray[np.int64]],
        count: int,
        *arguments: Any,
    ) -> Iterator[NDArray[np.int64]]:
        return iter(self._run([("part", rows, solve, part, arguments) for part in range(count)]))

    def write(self, name: str, ids: NDArray[np.int64] | slice, values: Any) -> None:
        self.state.arrays[name][ids] = values

    def _run(self, tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        waiting, deaths = deque(range(len(tasks))), 0
        results: dict[int, Any] = {}
        while len(results) < len(tasks):
            for worker in self._workers:
                if worker.task is None and waiting:
                    number = waiting.popleft()
                    worker.start(number, tasks[number])
            busy = {w.output.fileno(): w for w in self._workers if w.task is not None}
            for output in wait(list(busy)):
                worker = busy[cast(int, output)]
                number = cast(int, worker.task)
                try:
                    results[number] = worker.result()
                    deaths = 0
                except EOFError:
                    deaths += 1
                    waiting.appendleft(number)
                    self._replace(worker, deaths)
        return [results[number] for number in range(len(tasks))]

    def _replace(self, worker: Worker, deaths: int) -> None:
        worker.stop()
        if deaths >= MAX_DEATHS:
            raise SelectionError(
                f"worker processes died {deaths} times in a row (last exit code "
                f"{worker.process.returncode}): is there enough memory? Use fewer workers or "
                "more shards"
            )
        self._workers[self._workers.index(worker)] = Worker(self._directory, self._graph)

    def close(self) -> None:
        for worker in self._workers:
            worker.stop()
        shutil.rmtree(self._directory)


def shared_directory(graph: Graph) -> Path:
    """Shared memory if it has room for the state, and for the graph if that is in memory."""
    needed = graph.num_points * BYTES_PER_POINT
    if graph.path is None:
        needed += sum(a.nbytes for s in graph.shards for a in (s.indptr, s.indices, s.weights))
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > needed:
        return SHARED_MEMORY
    return Path(tempfile.gettempdir())


def save_instance(instance: Instance, directory: Path) -> None:
    numbers = {
        field.name: getattr(instance, field.name)
        for field in fields(instance)
        if field.name not in ARRAYS
    }
    (directory / "instance.pickle").write_bytes(pickle.dumps(numbers))
    for name in ARRAYS:
        np.save(directory / f"{name}.npy", getattr(instance, name))


def load_instance(directory: Path) -> Instance:
    numbers = pickle.loads((directory / "instance.pickle").read_bytes())
    arrays: dict[str, Any] = {name: _load(directory / f"{name}.npy") for name in ARRAYS}
    return Instance(**numbers, **arrays)


def _load(path: Path) -> NDArray[Any]:
    # An empty file cannot be mapped.
    array = np.load(path, mmap_mode="r") if path.stat().st_size > 128 else np.load(path)
    return np.asarray(array)
