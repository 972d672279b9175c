"""C1 and C2: 10 million points of 16 neighbours, in time and memory.

Each run is a process of its own, so that what it takes can be told: ``python -m
deltaserve.bench.select_scale RUN DIR`` prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.bench.select_check import Report
from deltaserve.select.backends.local import Local
from deltaserve.select.budgets import Budget
from deltaserve.select.graph import Graph
from deltaserve.select.options import Partition
from deltaserve.select.problem import Problem, Selection
from deltaserve.select.solve import solve

DEGREE = 16
SHARDS = 32
SHARE = 0.1


def status(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


class AnonymousPeak:
    """The largest anonymous memory while the block runs, sampled every 20 ms."""

    def __enter__(self) -> AnonymousPeak:
        self.peak, self._done = status("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, status("RssAnon"))

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, status("RssAnon"))


def random_regular(points: int, degree: int, seed: int) -> tuple[NDArray[Any], ...]:
    """rows, columns, weights of a graph without locality: degree / 2 random cycles."""
    rng = np.random.default_rng(seed)
    half = degree // 2
    rows, cols = np.empty(points * half, np.int32), np.empty(points * half, np.int32)
    for i in range(half):
        cycle = rng.permutation(points).astype(np.int32)
        rows[i * points : (i + 1) * points] = cycle
        cols[i * points : (i + 1) * points] = np.roll(cycle, 1)
    return rows, cols, rng.uniform(0.6, 0.9, points * half).astype(np.float32)


def write(directory: Path, points: int, seed: int) -> dict[str, Any]:
    start = time.perf_counter()
    rows, cols, weights = random_regular(points, DEGREE, seed)
    Graph.from_edges(points, rows, cols, weights, shards=SHARDS, path=directory / "graph")
    np.save(directory / "utility.npy", np.random.default_rng(seed + 1).random(points, np.float32))
    return {"seconds": time.perf_counter() - start}


def problem_of(directory: Path, graph: Graph) -> Problem:
    utility = np.load(directory / "utility.npy", mmap_mode="r")
    return Problem(graph, np.asarray(utility), Budget(round(SHARE * len(utility))))


def timed(problem: Problem, **options: Any) -> dict[str, Any]:
    """Wall and CPU seconds, the seconds of the first pass, and a digest of the answer."""
    start, clock = time.perf_counter(), time.process_time()
    found = solve(problem, **options)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - clock,
        "first": found.log[0]["seconds"],
        "sweeps": len(found.log),
        "objective": found.objective,
        "ids": digest(found),
    }


def digest(found: Selection) -> str:
    return hashlib.sha256(found.ids.tobytes() + found.gains.tobytes()).hexdigest()


def warm_up() -> None:
    """Compile everything that is timed."""
    ring = np.arange(100)
    for shards in (1, 2):
        graph = Graph.from_edges(100, ring, np.roll(ring, 1), np.ones(100), shards=shards)
        problem = Problem(graph, np.ones(100, np.float32), Budget(10))
        for solver in ("dominance", "greedy", "partition"):
            solve(problem, solver=solver)


def in_memory(directory: Path) -> dict[str, Any]:
    warm_up()
    opened = Graph.open(directory / "graph")
    whole = Graph([opened.merged()])
    problem = problem_of(directory, whole.resharded(2))
    found: dict[str, Any] = {
        "bounding": timed(problem, backend=Local(2)),
        "dominance": timed(problem, bounding=None, backend=Local(2)),
    }
    found["peak"] = status("VmHWM")
    found["greedy"] = timed(problem_of(directory, whole), solver="greedy", bounding=None)
    options = {"solver": "partition", "bounding": None, "partition": Partition(16, 8)}
    found["partition"] = timed(problem, backend=Local(2), **options)
    return found


def from_disk(directory: Path) -> dict[str, Any]:
    warm_up()
    problem = problem_of(directory, Graph.open(directory / "graph"))
    before = status("RssAnon")
    with AnonymousPeak() as memory:
        found: dict[str, Any] = {
            "bounding": timed(problem, scratch=directory / "scratch"),
            "dominance": timed(problem, bounding=None, scratch=directory / "scratch"),
        }
    return {**found, "peak": memory.peak, "before": before}


def limited(directory: Path) -> dict[str, Any]:
    """From disk, where the address space, mapped files included, is smaller than the graph."""
    size = sum(file.stat().st_size for file in (directory / "graph").iterdir())
    limit = int(0.9 * size)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    problem = problem_of(directory, Graph.open(directory / "graph"))
    return {
        "graph": size,
        "limit": limit,
        "dominance": timed(problem, bounding=None, scratch=directory / "scratch"),
        "address_space": status("VmPeak"),
    }


RUNS = {"memory": in_memory, "disk": from_disk, "limited": limited}


def run(name: str, directory: Path, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "deltaserve.bench.select_scale", name, str(directory), *more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the run {name} failed with exit code {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def scale(report: Report, seed: int, points: int, directory: Path | None) -> None:
    if directory:
        directory.mkdir(parents=True, exist_ok=True)
    root = Path(tempfile.mkdtemp(prefix="select.", dir=directory))
    try:
        written = run("write", root, "--points", str(points), "--seed", str(seed))
        report.fact("C1", f"building the graph of {points:,} points, seconds", written["seconds"])
        _report(report, points, {name: run(name, root) for name in RUNS})
    finally:
        shutil.rmtree(root)


def _report(report: Report, points: int, found: dict[str, Any]) -> None:
    # The bounds are for 10 million points on two cores; time and memory grow linearly.
    part, memory, disk, small = points / 1e7, found["memory"], found["disk"], found["limited"]
    first = memory["bounding"]["first"]
    report.at_most("C1", "bounding pass in memory, seconds", first, 5 * part)
    report.at_most("C1", "bounding pass from disk, seconds", disk["bounding"]["first"], 10 * part)
    report.at_most("C1", "heap greedy, seconds", memory["greedy"]["seconds"], 15 * part)
    report.at_most("C1", "dominance in memory, seconds", memory["dominance"]["seconds"], 10 * part)
    report.fact("C1", "dominance in memory, CPU seconds", memory["dominance"]["cpu"])
    report.fact("C1", "dominance, sweeps", memory["dominance"]["sweeps"])
    report.fact("C1", "dominance from disk, seconds", disk["dominance"]["seconds"])
    name = "16 partitions, 8 rounds, seconds"
    report.at_most("C1", name, memory["partition"]["seconds"], 180 * part)
    share = memory["partition"]["objective"] / memory["greedy"]["objective"]
    report.fact("C1", "16 partitions, 8 rounds, ratio to greedy", share)
    runs = (memory["dominance"], disk["dominance"], small["dominance"])
    same = all(each["ids"] == memory["greedy"]["ids"] for each in runs)
    report.at_least("C1", "dominance equals heap greedy: in memory, from disk, limited", same, 1)
    mega = 1 << 20
    report.at_most("C2", "in memory: peak, MB", memory["peak"] / mega, 3.5 * 1024 * part + 300)
    allowed = (300e6 + 6 * points) / mega
    report.at_most("C2", "from disk: peak of anonymous memory, MB", disk["peak"] / mega, allowed)
    report.fact("C2", "of that before the selection began, MB", disk["before"] / mega)
    report.fact("C2", "graph on disk, MB", small["graph"] / mega)
    limit = small["limit"] / mega
    used = small["address_space"] / mega
    report.at_most("C2", "address space of the limited run, MB", used, limit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", choices=("write", *RUNS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--points", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.run == "write":
        print(json.dumps(write(args.directory, args.points, args.seed)))
    else:
        print(json.dumps(RUNS[args.run](args.directory)))


if __name__ == "__main__":
    main()
