"""C1 and C2: 10 million points of 16 neighbours, in time and memory.

Each run is a process of its own, so that what it takes can be told: ``python -m
deltaserve.bench.select_scale RUN DIR`` prints one JSON object. Times are held to their bounds in
CPU seconds, all threads and the system's part together, which other load on the machine hardly
changes; wall seconds stand beside them, with the load that they were measured under.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
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
SHARDS = 16
SHARE = 0.1
# Smaller graphs are no larger than what Python, numpy and the compiler map by themselves.
LIMITED_FROM = 10_000_000


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
    """Wall and CPU seconds, those of the first pass, and a digest of the answer."""
    start, clock = time.perf_counter(), time.process_time()
    passes: list[float] = []
    found = solve(problem, progress=lambda _: passes.append(time.process_time()), **options)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - clock,
        "first_seconds": found.log[0]["seconds"],
        "first_cpu": passes[0] - clock,
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
        _report(report, points, {name: run(name, root) for name in ("memory", "disk")})
        if points >= LIMITED_FROM:
            _report_limited(report, run("limited", root))
    finally:
        shutil.rmtree(root)


def _report(report: Report, points: int, found: dict[str, Any]) -> None:
    # The bounds are for 10 million points on two cores; time and memory grow linearly.
    part, memory, disk = points / 1e7, found["memory"], found["disk"]
    report.fact("C1", "load average of the machine", os.getloadavg()[0])
    for name, each, key, bound in (
        ("bounding pass in memory", memory["bounding"], "first_", 5),
        ("bounding pass from disk", disk["bounding"], "first_", 10),
        ("heap greedy", memory["greedy"], "", 15),
        ("dominance in memory", memory["dominance"], "", 10),
        ("16 partitions, 8 rounds", memory["partition"], "", 180),
    ):
        report.at_most("C1", f"{name}, CPU seconds", each[f"{key}cpu"], bound * part)
        report.fact("C1", f"{name}, wall seconds", each[f"{key}seconds"])
    report.fact("C1", "dominance, sweeps", memory["dominance"]["sweeps"])
    report.fact("C1", "dominance from disk, CPU seconds", disk["dominance"]["cpu"])
    report.fact("C1", "dominance from disk, wall seconds", disk["dominance"]["seconds"])
    share = memory["partition"]["objective"] / memory["greedy"]["objective"]
    report.fact("C1", "16 partitions, 8 rounds, ratio to greedy", share)
    for name, each in (("in memory", memory), ("from disk", disk)):
        same = each["dominance"]["ids"] == memory["greedy"]["ids"]
        report.at_least("C1", f"dominance {name} equals heap greedy", same, 1)
    mega = 1 << 20
    report.at_most("C2", "in memory: peak, MB", memory["peak"] / mega, max(512, 3584 * part))
    allowed = (300e6 + 6 * points) / mega
    report.at_most("C2", "from disk: peak of anonymous memory, MB", disk["peak"] / mega, allowed)
    report.fact("C2", "of that before the selection began, MB", disk["before"] / mega)


def _report_limited(report: Report, found: dict[str, Any]) -> None:
    mega = 1 << 20
    report.fact("C2", "graph on disk, MB", found["graph"] / mega)
    limit, used = found["limit"] / mega, found["address_space"] / mega
    report.at_most("C2", "limited to 90 % of that: address space used, MB", used, limit)
    report.fact("C2", "limited: dominance, seconds", found["dominance"]["seconds"])


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
